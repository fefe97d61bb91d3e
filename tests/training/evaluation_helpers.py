"""What the tests of the evaluation share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from toprl_models import TopRLPolicy, tiny
from toprl_models.methods.toprl import model_signature
from training.evaluation.config import EvaluateConfig

LAYERS, KEPT = [1, 2, 3], [8, 4, 2]
MEASURED = ("prefill_seconds", "decode_seconds")


def save_policy(folder: Path, task: str | None = "ocr", seed: int = 0, layers: list[int] = LAYERS) -> str:
    """An untrained actor for the tiny model."""
    torch.manual_seed(seed)
    model, _ = tiny.load()
    metadata = {"model": "tiny", **({"task": task} if task else {})}
    TopRLPolicy(tiny.HIDDEN_SIZE, layers, 16, model_signature(model), metadata=metadata).save_pretrained(folder)
    return str(folder)


def config_of(folder: Path, **changes: Any) -> EvaluateConfig:
    """Two cheap methods beside the unpruned run, on 32 scenes in batches of 4."""
    given: dict[str, Any] = {
        "model_name_or_path": "tiny",
        "task": ["ocr"],
        "method": ["fastv", "random"],
        "keep": KEPT,
        "stages": LAYERS,
        "seeds": [0, 1],
        "limit": 32,
        "batch_size": 4,
        "device": "cpu",
        "output_dir": str(folder),
    }
    return EvaluateConfig(**given | changes)


def flags_of(config: EvaluateConfig) -> list[str]:
    """The command line of a config."""
    flags: list[str] = []
    for name, value in vars(config).items():
        if value and value is not True:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def read_samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]
