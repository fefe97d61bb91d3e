"""Checkpoints of a training run."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from toprl_models import TopRLPolicy
from training.trainer.config import PPOConfig


def save_checkpoint(folder: Path, policy: TopRLPolicy, state: dict[str, Any]) -> None:
    """Write policy and trainer state aside, then swap: a reader never sees a half-written checkpoint."""
    aside, old = folder.with_name("checkpoint.tmp"), folder.with_name("checkpoint.old")
    shutil.rmtree(aside, ignore_errors=True)
    policy.save_pretrained(aside)
    torch.save(state, aside / "trainer_state.pt")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, policy: TopRLPolicy, config: PPOConfig) -> dict[str, Any] | None:
    """The trainer state of the newest whole checkpoint, its weights put into ``policy``; None where there is none."""
    for candidate in (folder, folder.with_name("checkpoint.old")):
        path = candidate / "trainer_state.pt"
        if path.is_file():
            state = torch.load(path, weights_only=True)
            theirs = {k: v for k, v in state["config"].items() if k not in ("resume", "output_dir")}
            ours = {k: v for k, v in asdict(config).items() if k not in ("resume", "output_dir")}
            if theirs != ours:
                different = {k: (theirs.get(k), v) for k, v in ours.items() if theirs.get(k) != v}
                raise ValueError(f"--resume auto: the checkpoint was made with other flags: {different} (theirs, ours)")
            policy.load_state_dict(TopRLPolicy.from_pretrained(candidate).state_dict())
            return state
    return None
