"""What test_distributed.py starts as two processes by torchrun: ``distributed_run.py tp|fsdp FOLDER``.

``FOLDER/<family>`` is a saved model. Each rank writes what it measured to ``FOLDER/<kind>-<rank>.pt``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.models.agreement import MIXED
from tests.models.conftest import HashPolicy
from tests.models.tiny_families import HIDDEN_SIZE, PAD_ID, build_inputs, build_model, tiny_family
from toprl_models import (
    FastV,
    Policy,
    PyramidDrop,
    RandomPolicy,
    Schedule,
    SparseVLM,
    StageContext,
    TopRLPolicy,
    attach,
)
from toprl_models.probe import decoder_of

FAMILIES = ("llava", "qwen2_5_vl")
SCHEDULE = Schedule(((2, 0.5), (4, 0.25)))
WORDS = 4


def learned(condition_on: str) -> TopRLPolicy:
    torch.manual_seed(0)
    policy = TopRLPolicy(HIDDEN_SIZE, list(SCHEDULE.layers), actor_size=8, condition_on=condition_on)
    with torch.no_grad():
        policy.head.weight.normal_()  # at first all scores are nearly alike
    return policy


POLICIES: dict[str, tuple[Callable[[], Policy], str]] = {
    "fastv": (FastV, "compact"),
    "fastv, mask": (FastV, "mask"),
    "pyramiddrop": (PyramidDrop, "compact"),
    "pyramiddrop, mask": (lambda: PyramidDrop(positions="original"), "mask"),
    "sparsevlm": (SparseVLM, "compact"),
    "toprl": (lambda: learned("none"), "compact"),
    "toprl, mask": (lambda: learned("none"), "mask"),
    "toprl, text": (lambda: learned("text"), "compact"),
    "toprl, text, mask": (lambda: learned("text"), "mask"),
    "random": (RandomPolicy, "compact"),
    "random, mask": (RandomPolicy, "mask"),
}


class RankPolicy(HashPolicy):
    """Scores that differ by rank, as those of a policy whose arithmetic depends on the device might."""

    def score(self, context: StageContext) -> Tensor:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return (-1) ** rank * super().score(context)


TENSOR_PARALLEL = POLICIES | {"ranks differ": (RankPolicy, "compact"), "ranks differ, mask": (RankPolicy, "mask")}


def prepared(model: Any) -> Any:
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD_ID
    return model.eval().requires_grad_(False)


def measure(model: Any, family: str, name: str, shard: Callable[[Any], None] | None = None) -> dict[str, Any]:
    """Run one policy: kept tokens and scores of each stage, logits of each row's last token, a greedy answer."""
    make, mode = TENSOR_PARALLEL[name]
    inputs = build_inputs(family, MIXED)
    with torch.no_grad(), attach(model, make(), schedule=SCHEDULE, mode=mode) as pruner:  # type: ignore[arg-type]
        if shard is not None:
            shard(model)
        logits = model(**inputs).logits[:, -1]
        trace = pruner.trace
        answer = model.generate(**inputs, max_new_tokens=WORDS, do_sample=False)
    return {
        "indices": [stage.indices for stage in trace],
        "scores": [stage.scores for stage in trace],
        "logits": whole(logits),
        "answer": answer[:, -WORDS:],
    }


def whole(tensor: Any) -> Tensor:
    """Gather the parts of a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradient_norm(model: Any, prune: bool) -> float:
    """Train the decoder for one step on an answer, the last 3 tokens of each row: the norm of all gradients."""
    model.get_decoder().requires_grad_(True)
    inputs = build_inputs("llava", MIXED)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    if prune:
        with attach(model, FastV(), schedule=SCHEDULE):
            model(**inputs, labels=labels).loss.backward()
    else:
        model(**inputs, labels=labels).loss.backward()
    gradients = [whole(weight.grad) for weight in model.parameters() if weight.grad is not None]
    model.requires_grad_(False)
    model.zero_grad()
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def tensor_parallel(folder: Path) -> dict[str, Any]:
    """Divide the heads of each layer among the ranks."""
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        options: dict[str, Any] = {"distributed_config": DistributedConfig(tp_size=2)}
    except ImportError:
        options = {"tp_plan": "auto"}
    measured: dict[str, Any] = {}
    for family in FAMILIES:
        model = prepared(type(tiny_family(family).build()).from_pretrained(folder / family, **options))
        heads = decoder_of(model).layers[0].self_attn.q_proj.weight
        measured[family] = {"local": heads.to_local().shape[0], "whole": heads.shape[0]}
        for name in TENSOR_PARALLEL:
            measured[family][name] = measure(model, family, name)
    return measured


def fully_sharded(folder: Path) -> dict[str, Any]:
    """Shard each decoder layer and the model, before or after ``attach``."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")

    def shard(model: Any) -> None:
        for layer in decoder_of(model).layers:
            fully_shard(layer)
        fully_shard(model)

    measured: dict[str, Any] = {}
    for family in FAMILIES:
        model = prepared(build_model(family))
        shard(model)
        weight = decoder_of(model).layers[0].self_attn.q_proj.weight
        measured[family] = {"local": weight.to_local().shape[0], "whole": weight.shape[0]}
        for name in POLICIES:
            measured[family][name] = measure(model, family, name)
            measured[family][f"{name}, sharded later"] = measure(prepared(build_model(family)), family, name, shard)
        if family == "llava":
            measured["gradient norm"] = [gradient_norm(model, prune) for prune in (False, True)]
    return measured


if __name__ == "__main__":
    kind, target = sys.argv[1], Path(sys.argv[2])
    results = {"tp": tensor_parallel, "fsdp": fully_sharded}[kind](target)
    torch.save(results, target / f"{kind}-{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()
