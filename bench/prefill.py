"""Prefill time of an image prompt: unpruned, FastV, PyramidDrop and TOP-RL on the plain LLaVA class, random weights.

    python bench/run.py --suite prefill --quick

All methods of a case compute the same average number of visual tokens per layer. PyramidDrop and TOP-RL share one
schedule; FastV prunes once, before layer 2. Correctness comes first and raises (``WrongPrefillError``): a narrow copy
of the case in float32 must pass ``toprl_models.verify``, and the timed prefills must keep as many tokens, and fill
caches as long, as the schedule says. Weights are random, so which tokens survive means nothing here; how many do, and
what that saves, does not depend on the weights.

Timed is ``model(**inputs, use_cache=True, logits_to_keep=1)`` with the pruner's hooks at work; attaching is not. Where
transformers takes ``mm_encoder_outputs`` the image features are computed beforehand, and column ``vision_tower`` says
"outside"; else it says "timed", and a vision tower of width 64 is part of the time.

On a CPU shared with other processes set OMP_NUM_THREADS to the number of free cores: a thread that waits for another
without a core measures the scheduler, and all methods then take the same time.

Columns that need a word:
    average_tokens: visual tokens per layer, mean over the layers.
    stages: "layer:kept" of each stage.
    speedup: ms_p50 of unpruned over ms_p50 of the method.
    macs_ratio: decoder multiply-adds of unpruned over those of the method, text tokens and grouped queries included.
        As in Eq. 8, attention counts all n^2 pairs. The cost of choosing tokens is in the time, not in this ratio.
    macs_ratio_visual: the same by Eqs. 8-9, visual tokens alone, grouped queries ignored (the paper's count).
    kv_bytes: bytes of keys and values in the cache after the prefill, measured.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from bench.common import Report, Row, dtype_name, in_turn, milliseconds, quantiles
from toprl_kernels import flops
from toprl_models import FastV, Policy, Pruner, PyramidDrop, Schedule, TopRLPolicy, attach
from toprl_models.runtime.cache import cache_bytes
from toprl_models.schedule import stage_layers_for
from toprl_models.verify import verdict, verify

IMAGE_ID = 1
FIRST_WORD_ID = 4  # below it: padding, image placeholder, begin and end of sequence
PATCH_SIZE = 14
FASTV_STAGE = 2
TOLERANCE = 1e-3  # of the largest state or logit: what rounding may explain in float32
TAKES_FEATURES = "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters

Method = tuple[Policy, Schedule] | None  # None: unpruned


class WrongPrefillError(RuntimeError):
    """Pruning computed something else than it should; its timing would be worthless."""


@dataclass(frozen=True)
class Case:
    """One model shape and prompt. Each of ``num_images`` crops gives a square of visual tokens."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    visual_tokens: int
    average_tokens: float
    num_images: int = 1
    text_tokens: int = 64
    vocab_size: int = 32000
    actor_size: int = 256
    dtype: torch.dtype = torch.bfloat16

    @property
    def stage_layers(self) -> tuple[int, ...]:
        return stage_layers_for(self.num_layers)

    def schedule(self, layers: tuple[int, ...]) -> Schedule:
        sizes = {"num_visual": self.visual_tokens, "num_layers": self.num_layers}
        return Schedule.for_budget(self.average_tokens, layers, **sizes)

    def narrow(self) -> Case:
        """The same depth, prompt, head width and grouping with the fewest heads, in float32: for the check."""
        groups = self.num_heads // self.num_kv_heads
        heads, kv_heads = (groups, 1) if groups > 1 else (2, 2)
        hidden_size = heads * (self.hidden_size // self.num_heads)
        inner = self.intermediate_size * hidden_size // self.hidden_size
        return replace(
            self, hidden_size=hidden_size, intermediate_size=inner, num_heads=heads, num_kv_heads=kv_heads,
            vocab_size=min(self.vocab_size, 512), dtype=torch.float32,
        )  # fmt: skip


LLAVA_1_5_7B = Case("llava-1.5-7b", 4096, 11008, 32, 32, 32, visual_tokens=576, average_tokens=192)
# five crops of 24 x 24 patches
LLAVA_NEXT_7B = Case("llava-next-7b", 4096, 14336, 32, 32, 8, visual_tokens=2880, average_tokens=320, num_images=5)
# 98 M and 14 M parameters in decoder, embedding and head; 32 x 32 patches; the actor scaled with the width
LLAVA_100M = Case("llava-100m", 768, 2048, 12, 12, 12, 1024, 341, vocab_size=8192, actor_size=48, dtype=torch.float32)
LLAVA_14M = Case("llava-14m", 256, 704, 12, 4, 4, 1024, 341, vocab_size=8192, actor_size=16, dtype=torch.float32)
# for rehearsals: two crops of 4 x 4 patches
LLAVA_TOY = Case("toy", 32, 48, 4, 2, 1, 32, 16, num_images=2, text_tokens=9, vocab_size=100, actor_size=8,
                 dtype=torch.float32)  # fmt: skip


def cases(size: str, device: torch.device) -> list[Case]:
    if size == "tiny":
        return [LLAVA_TOY]
    if device.type == "cuda":
        return [LLAVA_1_5_7B, LLAVA_NEXT_7B]
    return [LLAVA_14M if size == "quick" else LLAVA_100M]


def run(size: str, device: torch.device, report: Report) -> None:
    """One row per (case, method).

    Raises:
        WrongPrefillError: a method computes wrong states or fills a cache of the wrong size.
    """
    torch.manual_seed(0)
    repeats = {"tiny": 1, "quick": 5, "full": 11} if device.type == "cpu" else {"tiny": 1, "quick": 10, "full": 50}
    for case in cases(size, device):
        with torch.no_grad():
            check_case(case, device)
            report.add(time_case(case, device, repeats[size]))
        release_memory(device)


def release_memory(device: torch.device) -> None:
    """A 7B model does not fit beside the next one on every GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -- model, prompt, methods ----------------------------------------------------------------------------------------


def build_model(case: Case, device: torch.device) -> LlavaForConditionalGeneration:
    """LLaVA with random weights of the case's shape, made on ``device`` in the case's dtype."""
    grid = math.isqrt(case.visual_tokens // case.num_images)
    if grid**2 * case.num_images != case.visual_tokens:
        raise ValueError(
            f"case {case.name}: visual_tokens={case.visual_tokens} must be num_images={case.num_images} times a square"
        )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        image_size=grid * PATCH_SIZE, patch_size=PATCH_SIZE,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=case.vocab_size, hidden_size=case.hidden_size, intermediate_size=case.intermediate_size,
        num_hidden_layers=case.num_layers, num_attention_heads=case.num_heads, num_key_value_heads=case.num_kv_heads,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        initializer_range=case.hidden_size**-0.5,  # unit gain: every layer changes the states at any width
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_ID, image_seq_length=grid**2,
        vision_feature_layer=-1, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=case.dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def build_inputs(
    case: Case, model: LlavaForConditionalGeneration, *, features: bool = TAKES_FEATURES
) -> dict[str, Any]:
    """One prompt: half of the text, the image, the other half; image features, or pixels."""
    device = model.device
    words = torch.randint(FIRST_WORD_ID, case.vocab_size, (1, case.text_tokens), device=device)
    image = torch.full((1, case.visual_tokens), IMAGE_ID, device=device)
    first, last = words.tensor_split([case.text_tokens // 2], dim=1)
    input_ids = torch.cat([first, image, last], dim=1)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    side = model.config.vision_config.image_size
    pixel_values = torch.randn(case.num_images, 3, side, side, device=device, dtype=case.dtype)
    if not features:
        return {**inputs, "pixel_values": pixel_values}
    outputs = model.model.get_image_features(pixel_values=pixel_values, return_dict=True)
    return {**inputs, "mm_encoder_outputs": {"image": outputs}}


def build_methods(case: Case, model: LlavaForConditionalGeneration) -> dict[str, Method]:
    """Policy and schedule of each method, all at the case's average number of visual tokens."""
    progressive = case.schedule(case.stage_layers)
    return {
        "unpruned": None,
        "fastv": (FastV(), case.schedule((FASTV_STAGE,))),
        "pyramiddrop": (PyramidDrop("original"), progressive),
        "toprl": (build_actor(case, list(case.stage_layers), model.device), progressive),
    }


def build_actor(case: Case, layers: list[int], device: torch.device) -> TopRLPolicy:
    """TOP-RL with random weights, as at inference: folded, in the model's dtype."""
    return TopRLPolicy(case.hidden_size, layers, case.actor_size).to(device, case.dtype).eval()


def attached(model: LlavaForConditionalGeneration, method: Method) -> contextlib.AbstractContextManager[Pruner | None]:
    """``attach`` for the method, nothing for unpruned."""
    return contextlib.nullcontext() if method is None else attach(model, method[0], schedule=method[1])


def segments_of(case: Case, schedule: Schedule | None) -> tuple[tuple[int, int], ...]:
    """``((visual tokens, layers), ...)``."""
    if schedule is None:
        return ((case.visual_tokens, case.num_layers),)
    return schedule.segments(case.visual_tokens, case.num_layers)


# -- correctness ---------------------------------------------------------------------------------------------------


def check_case(case: Case, device: torch.device) -> None:
    """Compare the pruned model with itself, on the narrow float32 copy of ``case``.

    Raises:
        WrongPrefillError: naming case, checks, and what was found and expected.
    """
    model = build_model(case.narrow(), device)
    found = verdict(verify(model, build_inputs(case.narrow(), model, features=False), tolerance=TOLERANCE))
    if found != "exact":
        raise WrongPrefillError(f"{case.name}: {found}")


def check_cache(where: str, case: Case, cache: Any, schedule: Schedule | None) -> None:
    """Each layer's keys and values must be as many as the schedule's segment says."""
    expected = [tokens + case.text_tokens for tokens, layers in segments_of(case, schedule) for _ in range(layers)]
    sizes = [(layer.keys.shape[2], layer.values.shape[2]) for layer in cache.layers]
    if sizes != [(n, n) for n in expected]:
        raise WrongPrefillError(f"{where}: keys and values per layer are {sizes}, the schedule says {expected} of each")


# -- timing --------------------------------------------------------------------------------------------------------


def time_case(case: Case, device: torch.device, repeats: int) -> list[Row]:
    """The methods of one case timed in turn; one row per method."""
    model = build_model(case, device)
    inputs = build_inputs(case, model)
    methods = build_methods(case, model)
    kv_bytes: dict[str, int] = {}

    def timed(name: str) -> float:
        """A prefill that must have gone through every stage; caches and logits of the first are looked at too."""
        method, where = methods[name], f"{case.name}, {name}"
        with attached(model, method) as pruner:
            ms, output = milliseconds(partial(model, **inputs, use_cache=True, logits_to_keep=1), device)
        if pruner is not None and method is not None:
            kept = [stage.counts for stage in pruner.trace]
            expected = [(count,) for count in method[1].counts(case.visual_tokens)]
            if kept != expected:
                raise WrongPrefillError(f"{where}: the timed prefill kept {kept} visual tokens, not {expected}")
        if name not in kv_bytes:
            check_cache(where, case, output.past_key_values, method and method[1])
            if not bool(output.logits.isfinite().all()):
                raise WrongPrefillError(f"{where}: logits in {case.dtype} are not finite")
            kv_bytes[name] = cache_bytes(output.past_key_values)
        return ms

    samples = in_turn({name: partial(timed, name) for name in methods}, min_rounds=repeats)
    unpruned, rows = quantiles(samples["unpruned"])[1], []
    for name, method in methods.items():
        schedule = method and method[1]
        stages = zip(schedule.layers, schedule.counts(case.visual_tokens), strict=True) if schedule else ()
        p20, p50, p80 = quantiles(samples[name])
        rows.append({
            "suite": "prefill", "case": case.name, "method": name,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": dtype_name(case.dtype), "attn": model.config.get_text_config()._attn_implementation,
            "threads": torch.get_num_threads(), "vision_tower": "outside" if TAKES_FEATURES else "timed", "batch": 1,
            "visual_tokens": case.visual_tokens, "text_tokens": case.text_tokens, "layers": case.num_layers,
            "stages": " ".join(f"{layer}:{count}" for layer, count in stages),
            "average_tokens": sum(n * layers for n, layers in segments_of(case, schedule)) / case.num_layers,
            "ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "speedup": unpruned / p50,
            "macs_ratio": decoder_macs(case, None) / decoder_macs(case, schedule),
            "macs_ratio_visual": visual_macs(case, None) / visual_macs(case, schedule),
            "kv_bytes": kv_bytes[name], "correct": True,  # a wrong method never gets this far
            "repeats": len(samples[name]),
        })  # fmt: skip
    return rows


def decoder_macs(case: Case, schedule: Schedule | None) -> float:
    """Multiply-adds of all decoder layers, text tokens and grouped queries included (Eq. 8 per layer)."""
    sizes, ratio = (case.hidden_size, case.intermediate_size), case.num_kv_heads / case.num_heads
    segments = segments_of(case, schedule)
    return sum(layers * flops.layer_macs(n + case.text_tokens, *sizes, kv_ratio=ratio) for n, layers in segments)


def visual_macs(case: Case, schedule: Schedule | None) -> float:
    """Multiply-adds of the visual tokens alone (Eqs. 8-9)."""
    sizes = (case.hidden_size, case.intermediate_size)
    return sum(layers * flops.layer_macs(n, *sizes) for n, layers in segments_of(case, schedule))
