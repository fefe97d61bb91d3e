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

from typing import Any

import torch
from torch import Tensor

from bench import prefill
from bench.common import Row, dtype_name, now, quantiles
from bench.prefill import Case, Methods, WrongPrefillError, attached, build_inputs, build_methods, build_model
from toprl_models import Policy, Schedule, StageContext, TopRLPolicy
from toprl_models.schedule import stage_layers_for

CASE = Case("llava-d512", 512, 1408, 12, 8, 8, 1024, 1024, vocab_size=8192, actor_size=64, dtype=torch.float32)
BAR = 1.02
DECODE_STEPS = 16
WARM_UP_ROUNDS = 2


class Constant(Policy):
    """The cheapest policy there is."""

    def score(self, context: StageContext) -> Tensor:
        return torch.zeros_like(context.valid_mask, dtype=torch.float32)


def run(suite: str, size: str, device: str | torch.device) -> list[Row]:
    """One row per case, way and phase.

    Raises:
        WrongPrefillError: keep-all changed a logit.
    """
    device = torch.device(device)
    torch.manual_seed(0)
    rounds = {"tiny": 1, "quick": 7, "full": 31}[size]
    cases = prefill.cases(size, device)
    if suite == "overhead" and size != "tiny":
        cases = [CASE]
    rows: list[Row] = []
    for case in cases:
        with torch.no_grad():
            model = build_model(case, device)
            ways = keep_all(case, model) if suite == "overhead" else build_methods(case, model)
            rows += time_ways(suite, case, model, ways, rounds, device)
        del model, ways
        prefill.release_memory(device)
    return rows


def keep_all(case: Case, model: Any) -> Methods:
    """Ways that remove nothing."""
    layers = stage_layers_for(case.num_layers)
    everything = Schedule(tuple((layer, 1.0) for layer in layers))
    actor = TopRLPolicy(case.hidden_size, list(layers), case.actor_size).to(model.device, case.dtype)
    return {"unpruned": None, "hooks": (Constant(), everything), "hooks and actor": (actor, everything)}


def time_ways(suite: str, case: Case, model: Any, ways: Methods, rounds: int, device: torch.device) -> list[Row]:
    """All ways in turn, round after round."""
    inputs = build_inputs(case, model)
    samples: dict[tuple[str, str], list[float]] = {(way, phase): [] for way in ways for phase in ("prefill", "decode")}
    expected = None
    for number in range(WARM_UP_ROUNDS + rounds):
        for way, method in ways.items():
            with attached(model, method):
                before = now(device)
                output = model(**inputs, use_cache=True, logits_to_keep=1)
                middle = now(device)
                for _ in range(DECODE_STEPS):
                    token = output.logits[:, -1:].argmax(-1)
                    output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
                after = now(device)
            expected = output.logits if expected is None else expected
            if suite == "overhead" and not torch.equal(output.logits, expected):
                raise WrongPrefillError(f"{case.name}, {way}: keep-all moved the logits of the unattached model")
            if number >= WARM_UP_ROUNDS:
                samples[way, "prefill"].append(middle - before)
                samples[way, "decode"].append((after - middle) / DECODE_STEPS)
    rows = []
    for (way, phase), times in samples.items():
        p20, p50, p80 = quantiles(times)
        r20, r50, r80 = quantiles([a / b for a, b in zip(times, samples["unpruned", phase], strict=True)])
        rows.append(
            {
                "suite": suite, "case": case.name, "way": way, "phase": phase, "dtype": dtype_name(case.dtype),
                "layers": case.num_layers, "visual_tokens": case.visual_tokens, "text_tokens": case.text_tokens,
                "ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "ratio_p20": r20, "ratio_p50": r50, "ratio_p80": r80,
                "ratio_of_best": min(times) / min(samples["unpruned", phase]),
                "bar": BAR if way == "hooks" else None, "rounds": len(times),
            }
        )  # fmt: skip
    return rows
