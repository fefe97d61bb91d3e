"""A prompt and the tokens after it: what pruning saves from end to end, and what a pruner costs that removes nothing.

    python bench/run.py --suite generate
    python bench/run.py --suite overhead

generate: the prefill suite's models and methods; prefill and single decode steps are timed apart. overhead: one model
and prompt (12 layers, d = 512, 1024 visual and 64 text tokens; random weights), three ways: unpruned; keep-all with
constant scores, which is the cost of hooks and bookkeeping; keep-all with TOP-RL's actor, whose network runs on all
tokens at every stage. There logits must be equal bit by bit first (``WrongPrefillError``).

``ratio_p50`` is the median over rounds of time attached / time unpruned of the same round; p20 and p80 likewise.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import prefill
from bench.common import Report, Row, dtype_name, in_turn, now, quantiles
from bench.prefill import Case, Method, WrongPrefillError, attached, build_inputs, build_methods, build_model
from toprl_models import Policy, Schedule, StageContext
from toprl_models.schedule import stage_layers_for

CASE = Case("llava-d512", 512, 1408, 12, 8, 8, 1024, 1024, vocab_size=8192, actor_size=64, dtype=torch.float32)
BAR = 1.02
DECODE_STEPS = 16


class Constant(Policy):
    """The cheapest policy there is."""

    def score(self, context: StageContext) -> Tensor:
        return torch.zeros_like(context.valid_mask, dtype=torch.float32)


def run(size: str, device: torch.device, report: Report) -> None:
    """One row per case, way and phase.

    Raises:
        WrongPrefillError: keep-all changed a logit.
    """
    torch.manual_seed(0)
    rounds = {"tiny": 1, "quick": 7, "full": 31}[size]
    overhead = report.suite == "overhead"
    for case in [CASE] if overhead and size != "tiny" else prefill.cases(size, device):
        with torch.no_grad():
            model = build_model(case, device)
            ways = keep_all(case, model) if overhead else build_methods(case, model)
            report.add(time_ways(report.suite, case, model, ways, rounds))
        del model, ways
        prefill.release_memory(device)


def keep_all(case: Case, model: Any) -> dict[str, Method]:
    """Ways that remove nothing."""
    layers = stage_layers_for(case.num_layers)
    everything = Schedule(tuple((layer, 1.0) for layer in layers))
    actor = prefill.build_actor(case, list(layers), model.device)
    return {"unpruned": None, "hooks": (Constant(), everything), "hooks and actor": (actor, everything)}


def time_ways(suite: str, case: Case, model: Any, ways: Mapping[str, Method], rounds: int) -> list[Row]:
    """All ways in turn, round after round."""
    inputs = build_inputs(case, model)
    expected: list[Tensor] = []  # the logits of the first call, which is the unpruned model's

    def timed(way: str) -> tuple[float, float]:
        """Milliseconds of the prefill and of a decoding step."""
        with attached(model, ways[way]):
            before = now(model.device)
            output = model(**inputs, use_cache=True, logits_to_keep=1)
            middle = now(model.device)
            for _ in range(DECODE_STEPS):
                token = output.logits[:, -1:].argmax(-1)
                output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            after = now(model.device)
        if not expected:
            expected.append(output.logits)
        if suite == "overhead" and not torch.equal(output.logits, expected[0]):
            raise WrongPrefillError(f"{case.name}, {way}: keep-all moved the logits of the unattached model")
        return middle - before, (after - middle) / DECODE_STEPS

    samples = in_turn({way: partial(timed, way) for way in ways}, min_rounds=rounds)
    rows = []
    for way, phase in ((way, phase) for way in ways for phase in (0, 1)):
        times, unpruned = ([pair[phase] for pair in samples[name]] for name in (way, "unpruned"))
        p20, p50, p80 = quantiles(times)
        r20, r50, r80 = quantiles([a / b for a, b in zip(times, unpruned, strict=True)])
        rows.append({
            "suite": suite, "case": case.name, "way": way, "phase": ("prefill", "decode")[phase],
            "dtype": dtype_name(case.dtype), "layers": case.num_layers, "visual_tokens": case.visual_tokens,
            "text_tokens": case.text_tokens, "ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "ratio_p20": r20,
            "ratio_p50": r50, "ratio_p80": r80, "ratio_of_best": min(times) / min(unpruned),
            "bar": BAR if way == "hooks" else None, "rounds": len(times),
        })  # fmt: skip
    return rows
