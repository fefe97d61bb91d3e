"""Need lmms-eval: ``make test-lmms-eval`` runs them in an environment of its own; nothing is collected elsewhere."""

from __future__ import annotations

import importlib.util
import os

import torch

if importlib.util.find_spec("lmms_eval") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # before a library reads them
    if not torch.version.cuda:
        # torchvision's wheel for Linux is built for CUDA: beside a CPU build of torch its operators cannot be loaded,
        # and its import fails because it describes two of them. Its transforms are plain Python and need none.
        TORCHVISION = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            TORCHVISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
