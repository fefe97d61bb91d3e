"""Layers that do not see all earlier tokens, or see later ones: sliding windows, chunks, images and prefixes in blocks.

A surviving token sees a surviving token if the unattached model lets it: by slots of the whole sequence.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import flash_stand_in
from tests.models.agreement import ATOL, NEW_TOKENS, attached, generate, kept_slots, masked_by_hand
from tests.models.test_decoder_scores import LLAMA4, assert_scores, llava_of
from tests.models.tiny_families import (
    BOS_ID,
    FIRST_WORD,
    IMAGE_ID,
    PAD_ID,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    VOCABULARY,
    build_inputs,
    clip_config,
    text_config,
    visual_mask,
)
from toprl_models import Family, FastV, Policy, PyramidDrop, Schedule, StageTrace, families, register_family
from toprl_models.runtime.mask import make_plan

FULL, SLIDING = "full_attention", "sliding_attention"
SCHEDULE = Schedule(((1, 0.5), (3, 0.25), (5, 2)))
PER_IMAGE = 16
MIXED = {"head_dim": 16, "layer_types": [SLIDING, SLIDING, FULL] * 2}
IDS = {"boi_token_id": VISION_START_ID, "eoi_token_id": VISION_END_ID, "image_token_id": IMAGE_ID}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ("Gemma3", "Gemma4", "PaliGemma")
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    for name in rows:
        register_family(Family(f"{name}ForConditionalGeneration", name, "All tokens of every image."))


# --- models and prompts ---


def siglip() -> Any:
    from transformers import SiglipVisionConfig

    config = {key: value for key, value in clip_config().items() if key not in ("model_type", "projection_dim")}
    return SiglipVisionConfig(**config, vision_use_head=False)


def gemma3(window: int, kinds: tuple[str, ...] = tuple(MIXED["layer_types"])) -> Any:
    """Tokens of an image see each other, in layers with a window too, which the window cuts."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    text = Gemma3TextConfig(**text_config(**MIXED | {"layer_types": list(kinds)}, sliding_window=window))
    config = Gemma3Config(
        text_config=text,
        vision_config=siglip(),
        mm_tokens_per_image=PER_IMAGE,
        image_token_index=IMAGE_ID,
        boi_token_index=VISION_START_ID,
        eoi_token_index=VISION_END_ID,
    )
    model = Gemma3ForConditionalGeneration(config)
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(std=0.3)  # zeros at first
    return model


def gemma4(window: int) -> Any:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig, Gemma4VisionConfig

    heads = {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "sliding_window": window}
    blocks = {"use_bidirectional_attention": "vision", "vocab_size_per_layer_input": VOCABULARY}
    tower = Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        patch_size=4,
        pooling_kernel_size=2,
        position_embedding_size=16,
        initializer_range=0.3,
    )
    text = Gemma4TextConfig(**text_config(**MIXED | heads | blocks))
    return Gemma4ForConditionalGeneration(
        Gemma4Config(
            text_config=text, vision_config=tower, audio_config=None, video_token_id=VIDEO_ID, audio_token_id=94, **IDS
        )
    )


def paligemma(window: int | None) -> Any:
    """All tokens of the prompt see each other, the answer's are causal; with a window, the text model is Gemma 2."""
    from transformers import Gemma2Config, GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration

    text = GemmaConfig(**text_config(head_dim=16))
    if window is not None:  # Eq. 7 has no soft cap, which mask mode refuses
        changes = {"sliding_window": window, "attn_logit_softcapping": None, "final_logit_softcapping": None}
        text = Gemma2Config(**text_config(**MIXED | changes))
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(text_config=text, vision_config=siglip(), image_token_index=IMAGE_ID, projection_dim=64)
    )


def prompts(images: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """Left-padded prompts with that many images each."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(FIRST_WORD, 89, (n,), generator=generator).tolist()

    rows = []
    for number, count in enumerate(images):
        row = [BOS_ID, *words(2 + number)]
        for _ in range(count):
            row += [VISION_START_ID, *[IMAGE_ID] * PER_IMAGE, VISION_END_ID, *words(3)]
        rows.append(row)
    length = max(map(len, rows))
    ids = torch.tensor([[PAD_ID] * (length - len(row)) + row for row in rows])
    values = torch.randn(sum(images), 3, 32, 32, generator=generator)
    return {"input_ids": ids, "attention_mask": (ids != PAD_ID).long(), "pixel_values": values}


def gemma3_prompts(seed: int = 0) -> dict[str, Tensor]:
    inputs = prompts((1, 2), seed)
    return inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE_ID).long()}


def gemma4_prompts(seed: int = 0) -> dict[str, Tensor]:
    inputs = prompts((1, 2), seed)
    values = torch.rand(3, 64, 48, generator=torch.Generator().manual_seed(seed))
    places = torch.cartesian_prod(torch.arange(8), torch.arange(8)).flip(-1).expand(3, -1, -1)
    types = (inputs["input_ids"] == IMAGE_ID).long()
    return inputs | {"pixel_values": values, "image_position_ids": places, "mm_token_type_ids": types}


def paligemma_prompts(seed: int = 0) -> dict[str, Tensor]:
    inputs = prompts((1, 2), seed)
    return inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}


def llava_prompts(seed: int = 0) -> dict[str, Tensor]:
    return build_inputs("llava", (("image",), ("image", "image"), ()), seed=seed)


@dataclass
class Case:
    """A model, its prompts, and the argument with a type for each token, which has one value for answers."""

    build: Callable[[], Any]
    inputs: Callable[..., dict[str, Tensor]] = llava_prompts
    types: str | None = None
    answer: int = 0


def llava(config: str, **changes: Any) -> Callable[[], Any]:
    return functools.partial(llava_of, config, changes)


WINDOWS = (5, 24)  # shorter than an image, and than a prompt
CASES = {"PaliGemma": Case(functools.partial(paligemma, None), paligemma_prompts, "token_type_ids", 1)}
for size in WINDOWS:
    CASES |= {
        f"Gemma 3, {size}": Case(functools.partial(gemma3, size), gemma3_prompts, "token_type_ids"),
        f"Gemma 4, {size}": Case(functools.partial(gemma4, size), gemma4_prompts, "mm_token_type_ids"),
        f"PaliGemma 2, {size}": Case(functools.partial(paligemma, size), paligemma_prompts, "token_type_ids", 1),
    }
for size in WINDOWS:
    CASES |= {
        f"Mistral, {size}": Case(llava("MistralConfig", sliding_window=size)),
        f"Qwen2, {size}": Case(llava("Qwen2Config", use_sliding_window=True, sliding_window=size, max_window_layers=3)),
        f"Llama 4, {size}": Case(llava("Llama4TextConfig", **LLAMA4 | {"attention_chunk_size": size})),
    }
CASES["Gemma 3, 500"] = Case(functools.partial(gemma3, 500), gemma3_prompts, "token_type_ids")
# stages before and after the first layer of either kind, by which transformers sizes the masks
CASES |= {
    "Gemma 3, window first at layer 4": Case(
        functools.partial(gemma3, 12, (FULL,) * 4 + (SLIDING, FULL)), gemma3_prompts, "token_type_ids"
    ),
    "Gemma 3, window last": Case(
        functools.partial(gemma3, 12, (SLIDING,) * 5 + (FULL,)), gemma3_prompts, "token_type_ids"
    ),
}
# Gemma 2 has no sdpa in transformers
MODES = [("compact", "sdpa"), ("compact", "eager"), ("compact", "flex_attention"), ("mask", "eager")]
RUNS = [(name, *mode) for name in CASES for mode in MODES if not (mode[1] == "sdpa" and "PaliGemma 2" in name)]


def some(runs: list[Any], every: int) -> list[Any]:
    """Mark all but one of ``every`` runs as exhaustive; the number of modes is no multiple, so that each case stays."""
    return [
        pytest.param(*run, marks=() if number % every == 0 else pytest.mark.exhaustive)
        for number, run in enumerate(runs)
    ]


flex_on_a_cpu = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")


@functools.cache
def shared(name: str) -> Any:
    torch.manual_seed(0)
    model = CASES[name].build().eval().requires_grad_(False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD_ID
    return model


@contextlib.contextmanager
def under(name: str, backend: str) -> Iterator[Any]:
    """Give the shared model a backend of attention; torch's compiled flex attention takes a minute to build."""
    model = shared(name)
    model.set_attn_implementation({"text_config": backend})
    with torch.compiler.set_stance("force_eager" if backend == "flex_attention" else "default"):
        yield model


def joined(case: Case, *turns: dict[str, Tensor], answer: Tensor | None = None) -> dict[str, Tensor]:
    """Join turns, and an answer, to one prompt."""
    kinds = ["input_ids", "attention_mask", *([case.types] if case.types else [])]
    whole = {name: torch.cat([turn[name] for turn in turns], 1) for name in kinds}
    if answer is not None:
        tails = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
        tails |= {case.types: torch.full_like(answer, case.answer)} if case.types else {}
        whole = {name: torch.cat([whole[name], tails[name]], 1) for name in kinds}
    return turns[0] | whole


def by_hand(name: str, inputs: dict[str, Tensor], trace: list[StageTrace]) -> Tensor:
    """The model's own eager masks over the whole sequence, where the dropped keys are closed; without a cache."""
    with under(name, "eager") as model:
        return masked_by_hand(model, inputs | {"use_cache": False}, trace)


# --- against the model's own masks ---


@flex_on_a_cpu
@pytest.mark.parametrize(("name", "mode", "backend"), some(RUNS, 3))
def test_prompt_and_answer(name: str, mode: str, backend: str) -> None:
    case, answer = CASES[name], None
    inputs = case.inputs()
    with under(name, backend) as model:
        plain = model.base_model(**inputs).last_hidden_state
        with attached(model, SCHEDULE, mode) as pruner:
            states = model.base_model(**inputs).last_hidden_state
            answer = generate(model, inputs, suppress_tokens=[IMAGE_ID, VIDEO_ID])
    alive = kept_slots(inputs, pruner.trace[-1])
    expected = by_hand(name, inputs, pruner.trace)
    torch.testing.assert_close(states[alive], expected[alive], atol=ATOL, rtol=1e-4)
    assert (expected - plain)[alive].abs().max() > 0.1  # it could not fail if nothing was pruned
    words = answer.sequences[:, inputs["input_ids"].shape[1] :]
    longer = by_hand(name, joined(case, inputs, answer=words), pruner.trace)
    logits = model.lm_head(longer[:, -1 - NEW_TOKENS : -1])
    torch.testing.assert_close(torch.stack(answer.logits, 1), logits, atol=ATOL, rtol=1e-4)


def both_traces(first: list[StageTrace], second: list[StageTrace]) -> list[StageTrace]:
    """The stages of two turns, as if these were one."""
    joint = []
    for one, other in zip(first, second, strict=True):
        later = other.indices + torch.tensor(one.num_visual)[:, None]
        indices = torch.cat([one.indices, later.masked_fill(other.indices < 0, -1)], 1)
        joint.append(replace(one, indices=indices))
    return joint


@flex_on_a_cpu
@pytest.mark.parametrize(
    ("name", "mode", "backend", "first_stage"),
    some([(*run, first_stage) for run in RUNS if "Pali" not in run[0] for first_stage in (0, 1)], 7),
)
def test_two_turns(name: str, mode: str, backend: str, first_stage: int) -> None:
    """Images in both turns, on one cache.

    Two turns of PaliGemma are not one prompt: all of a prompt's tokens would see each other.
    """
    case = CASES[name]
    schedule = Schedule(((first_stage, 0.5), (3, 0.25), (5, 2)))
    first, second = case.inputs(), case.inputs(seed=1)
    whole = joined(case, first, second)
    more = {name: tensor for name, tensor in whole.items() if name not in ("input_ids", "pixel_values")}
    with under(name, backend) as model, attached(model, schedule, mode) as pruner:
        cache = model(**first, use_cache=True).past_key_values
        trace = pruner.trace
        states = model.base_model(**second | more, past_key_values=cache).last_hidden_state
        trace = both_traces(trace, pruner.trace)
    whole["pixel_values"] = interleaved(first, second)
    if "image_position_ids" in whole:
        whole["image_position_ids"] = whole["image_position_ids"].repeat(2, 1, 1)  # all pictures are of one size
    expected = by_hand(name, whole, trace)[:, first["input_ids"].shape[1] :]
    alive = kept_slots(whole, trace[-1])[:, first["input_ids"].shape[1] :]
    torch.testing.assert_close(states[alive], expected[alive], atol=ATOL, rtol=1e-4)


def interleaved(first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
    """Order the pictures of two turns by row."""
    counts = (visual_mask(first).sum(1) // PER_IMAGE).tolist()
    parts = zip(first["pixel_values"].split(counts), second["pixel_values"].split(counts), strict=True)
    return torch.cat([picture for pair in parts for picture in pair])


# --- scores ---


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].inputs is llava_prompts])
@pytest.mark.parametrize(("policy", "lag"), [(FastV(), 1), (PyramidDrop(positions="original"), 0)])
def test_scores_are_the_models_own_attention(name: str, policy: Policy, lag: int) -> None:
    with under(name, "eager") as model:
        assert_scores(model, policy, 4, 4 - lag)


# --- what is refused ---


@pytest.mark.parametrize("mode", ["compact", "mask"])
def test_a_static_cache(mode: str) -> None:
    """Within the window it is as good as another; beyond it, it lets tokens go by slot."""
    inputs, static = gemma3_prompts(), {"cache_implementation": "static", "disable_compile": True}
    with under("Gemma 3, 500", "sdpa") as model, attached(model, SCHEDULE, mode), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it saves no memory
        tokens = [generate(model, inputs, **options).sequences for options in ({}, static)]
        assert torch.equal(*tokens)
    with (
        under("Gemma 3, 24", "sdpa") as model,
        attached(model, SCHEDULE, mode),
        pytest.raises(RuntimeError, match=r"sliding_window=24 is shorter than .* tokens .* use a DynamicCache"),
    ):
        generate(model, inputs, **static)


def test_flash_attention_counts_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_stand_in.install(monkeypatch)
    inputs = llava_prompts()
    with under("Mistral, 24", "flash_attention_2") as model:
        with (
            attached(model, SCHEDULE),
            pytest.raises(RuntimeError, match=r"sliding_window=24 is shorter .* use attn_implementation=\"sdpa\""),
        ):
            model(**inputs)
        with attached(model, SCHEDULE, "mask"):  # has an attention of its own
            model(**inputs)


def test_a_mask_that_is_no_interval_is_refused() -> None:
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    mask[0, 0, 3, 1] = False
    with pytest.raises(ValueError, match=r"is no interval .* use mode=\"compact\""):
        make_plan(torch.ones(1, 4, dtype=torch.bool), mask)
    mask = torch.ones(1, 1, 2, 6, dtype=torch.bool).tril(1)  # free slots after the tokens: whose are the rows?
    with pytest.raises(ValueError, match="has other columns than the tokens so far"):
        make_plan(torch.ones(1, 6, dtype=torch.bool), mask)
