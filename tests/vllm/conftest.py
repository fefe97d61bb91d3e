"""Need vLLM: ``make test-vllm`` runs them in an environment of its own; nothing is collected elsewhere."""

from __future__ import annotations

import importlib.util
import os
import runpy
from pathlib import Path

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    SITE = Path(__file__).parent / "site"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an engine in this process can be taken apart again
        "VLLM_NO_USAGE_STATS": "1",
    }
    runpy.run_path(str(SITE / "sitecustomize.py"))

    from vllm.model_executor.models import registry

    # vLLM looks at each class in a new Python, so that none initialises CUDA: half a minute of imports for each
    registry._run_in_subprocess = lambda inspect: inspect()
