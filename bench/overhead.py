"""What an attached pruner costs when it removes nothing: keep-all against the unattached model, in turn.

    python bench/run.py --suite overhead

One model and prompt (12 layers, d = 512, 1024 visual and 64 text tokens; random weights), three ways: unattached;
keep-all with constant scores, which is the cost of hooks and bookkeeping; keep-all with TOP-RL's actor, whose network
runs on all tokens at every stage. Prefill and single decode steps are timed apart. Logits must be equal bit by bit
first (``WrongPrefillError``).

``ratio_p50`` is the median over rounds of time attached / time unattached of the same round; p20 and p80 likewise.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from bench.prefill import Case, WrongPrefillError, attached, build_inputs, build_model, quantiles
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


def run(quick: bool, device: str | torch.device) -> list[dict[str, Any]]:
    """One row per way and phase.

    Raises:
        WrongPrefillError: keep-all changed a logit.
    """
    device = torch.device(device)
    torch.manual_seed(0)
    with torch.no_grad():
        return _time(CASE, device, 7 if quick else 31)


def _time(case: Case, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    model = build_model(case, device)
    inputs = build_inputs(case, model)
    layers = stage_layers_for(case.num_layers)
    keep_all = Schedule(tuple((layer, 1.0) for layer in layers))
    actor = TopRLPolicy(case.hidden_size, list(layers), case.actor_size).to(device, case.dtype)
    ways = {"unattached": None, "hooks": (Constant(), keep_all), "hooks and actor": (actor, keep_all)}
    samples: dict[tuple[str, str], list[float]] = {(way, phase): [] for way in ways for phase in ("prefill", "decode")}
    expected = None
    for number in range(WARM_UP_ROUNDS + rounds):
        for way, method in ways.items():
            with attached(model, method):
                prefill, decode, logits = _measure(model, inputs, device)
            expected = logits if expected is None else expected
            if not torch.equal(logits, expected):
                raise WrongPrefillError(f"{case.name}, {way}: keep-all moved the logits of the unattached model")
            if number >= WARM_UP_ROUNDS:
                samples[way, "prefill"].append(prefill)
                samples[way, "decode"].append(decode)
    return [_row(case, way, phase, samples, device) for way, phase in samples]


def _measure(model: Any, inputs: dict[str, Any], device: torch.device) -> tuple[float, float, Tensor]:
    """Milliseconds of the prefill and of one decode step, and the last step's logits."""
    begin = _now(device)
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    prefill = _now(device) - begin
    begin = _now(device)
    for _ in range(DECODE_STEPS):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    return prefill, (_now(device) - begin) / DECODE_STEPS, output.logits


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3


def _row(
    case: Case, way: str, phase: str, samples: dict[tuple[str, str], list[float]], device: torch.device
) -> dict[str, Any]:
    own, base = samples[way, phase], samples["unattached", phase]
    p20, p50, p80 = quantiles(own)
    r20, r50, r80 = quantiles([one / other for one, other in zip(own, base, strict=True)])
    return {
        "suite": "overhead",
        "case": case.name,
        "way": way,
        "phase": phase,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(case.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "layers": case.num_layers,
        "visual_tokens": case.visual_tokens,
        "text_tokens": case.text_tokens,
        "ms_p20": p20,
        "ms_p50": p50,
        "ms_p80": p80,
        "ratio_p20": r20,
        "ratio_p50": r50,
        "ratio_p80": r80,
        "ratio_of_best": min(own) / min(base),
        "bar": BAR if way == "hooks" else None,
        "rounds": len(own),
    }
