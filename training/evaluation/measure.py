"""One batch through the model as it is (attached or not): answers, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toprl_models.runtime.cache import cache_bytes
from training.tasks import Sample, Task, read_answers


@dataclass
class Answers:
    """Of a batch: texts and scores, and per sample the seconds and bytes (the batch's over its size)."""

    texts: list[str]
    scores: list[float]
    prefill_seconds: float
    decode_seconds: float
    kv_bytes: int | None


class _Prefill:
    """Notes when the first forward pass of a generation is over, and what its cache holds."""

    def __init__(self, model: Any) -> None:
        self.model, self.ended = model, 0.0
        self.kv_bytes: int | None = None

    def __enter__(self) -> _Prefill:
        self._handle = self.model.register_forward_hook(self._after)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _after(self, module: Any, args: Any, output: Any) -> None:
        if not self.ended:
            synchronise(self.model.device)
            self.ended = time.perf_counter()
            cache = output.get("past_key_values")
            self.kv_bytes = None if cache is None else cache_bytes(cache)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def answer_timed(
    model: Any, processor: Any, task: Task, samples: Sequence[Sample], inputs: dict[str, Tensor]
) -> Answers:
    """Greedy answers, as ``training.tasks.answer`` gives them, with times and cache size.

    Prefill is everything up to the end of the first forward pass, the vision tower included; decode is the rest.
    """
    synchronise(model.device)
    with _Prefill(model) as prefill:
        began = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=task.max_new_tokens, do_sample=False)
        synchronise(model.device)
        ended = time.perf_counter()
    texts, scores = read_answers(processor, task, samples, inputs, output)
    n = len(samples)
    return Answers(
        texts=texts,
        scores=scores,
        prefill_seconds=(prefill.ended - began) / n,
        decode_seconds=(ended - prefill.ended) / n,
        kv_bytes=None if prefill.kv_bytes is None else prefill.kv_bytes // n,
    )
