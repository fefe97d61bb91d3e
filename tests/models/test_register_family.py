"""register_family(): classes that are not listed, and what their kinds of attention allow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.agreement import assert_agreement, attached, kept_slots
from tests.models.conftest import HashPolicy
from tests.models.tiny_families import (
    BOS_ID,
    FIRST_WORD,
    IMAGE_ID,
    PAD_ID,
    VISION_END_ID,
    VISION_START_ID,
    clip_config,
    text_config,
)
from toprl_models import Family, FastV, Policy, PyramidDrop, Schedule, attach, families, register_family
from toprl_models.probe import decoder_of

SCHEDULE = Schedule(((1, 0.5), (3, 0.25), (5, 2)))
FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = {"full": [FULL] * 6, "mixed": [SLIDING, SLIDING, FULL] * 2}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a test adds go with it."""
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))


def vision_config() -> dict[str, Any]:
    return {key: value for key, value in clip_config().items() if key not in ("model_type", "projection_dim")}


def smolvlm() -> Any:
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            text_config=LlamaConfig(**text_config()),
            vision_config=vision_config(),
            image_token_id=IMAGE_ID,
            scale_factor=2,
            pad_token_id=PAD_ID,
        )
    )


def idefics3() -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            text_config=LlamaConfig(**text_config()),
            vision_config=vision_config(),
            image_token_id=IMAGE_ID,
            scale_factor=2,
            pad_token_id=PAD_ID,
        )
    )


def gemma3(kinds: str = "mixed") -> Any:
    """Tokens of an image see each other; layers with a window turn by other angles than those without."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(**text_config(head_dim=16, sliding_window=500, layer_types=LAYER_TYPES[kinds]))
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=SiglipVisionConfig(**vision_config(), vision_use_head=False),
            mm_tokens_per_image=16,
            image_token_index=IMAGE_ID,
            boi_token_index=VISION_START_ID,
            eoi_token_index=VISION_END_ID,
        )
    )


@functools.cache
def model_of(make: Callable[..., Any], attn_implementation: str = "sdpa", **options: Any) -> Any:
    torch.manual_seed(0)
    model = make(**options).eval().requires_grad_(False)
    model.set_attn_implementation({"text_config": attn_implementation})
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD_ID
    return model


def prompts(images: tuple[int, ...], per_image: int) -> dict[str, Tensor]:
    """Left-padded prompts with that many images each."""
    generator = torch.Generator().manual_seed(0)

    def words(n: int) -> list[int]:
        return torch.randint(FIRST_WORD, 89, (n,), generator=generator).tolist()

    rows = []
    for number, count in enumerate(images):
        row = [BOS_ID, *words(2 + number)]
        for _ in range(count):
            row += [VISION_START_ID, *[IMAGE_ID] * per_image, VISION_END_ID, *words(3)]
        rows.append(row)
    length = max(map(len, rows))
    ids = torch.tensor([[PAD_ID] * (length - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD_ID).long()}


def smolvlm_inputs(images: tuple[int, ...]) -> dict[str, Tensor]:
    inputs = prompts(images, 4)
    values = torch.randn(len(images), max(images), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for row, count in enumerate(images):
        values[row, count:] = 0  # the model leaves out images of zeros
    return inputs | {"pixel_values": values}


def gemma3_inputs(images: tuple[int, ...]) -> dict[str, Tensor]:
    inputs = prompts(images, 16)
    values = torch.randn(sum(images), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return inputs | {"pixel_values": values, "token_type_ids": (inputs["input_ids"] == IMAGE_ID).long()}


# --- a class that is not listed ---


def test_an_unlisted_class_needs_no_row() -> None:
    with attached(model_of(smolvlm), SCHEDULE) as pruner:
        model_of(smolvlm)(**smolvlm_inputs((1,)))
    assert pruner.trace[0].counts == (2,)


def test_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="model is a Linear, not a model of transformers"):
        attached(torch.nn.Linear(2, 2), SCHEDULE)


def test_a_peft_model_gets_a_hint() -> None:
    class PeftModel(torch.nn.Module):
        pass

    with pytest.raises(TypeError, match=r"pass model\.get_base_model\(\)"):
        attached(PeftModel(), SCHEDULE)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [smolvlm, idefics3])
@pytest.mark.parametrize("images", [(1,), (2, 1)])
def test_a_registered_class_works(make: Callable[[], Any], images: tuple[int, ...], attn_implementation: str) -> None:
    model, inputs = model_of(make, attn_implementation), smolvlm_inputs(images)
    register_family(Family(type(model).__name__, "SmolVLM", "All tokens of every tile."))
    assert_agreement(model, inputs, SCHEDULE)


def test_a_subclass_of_a_registered_class_is_covered() -> None:
    model = model_of(smolvlm)
    register_family(Family("SmolVLMPreTrainedModel", "SmolVLM", "All tokens of every tile."))
    with attached(model, SCHEDULE) as pruner:
        model(**smolvlm_inputs((1,)))
    assert pruner.trace[0].counts == (2,)


def test_the_row_of_a_registered_class_counts() -> None:
    name = "SmolVLMForConditionalGeneration"
    register_family(Family(name, "SmolVLM", "All tokens.", min_stage=lambda model: 2))
    with pytest.raises(ValueError, match="can prune before layer 2 at the earliest"):
        attached(model_of(smolvlm), SCHEDULE)
    register_family(Family(name, "SmolVLM", "All tokens.", visual_ids=("picture_id",)))
    with pytest.raises(ValueError, match=r"has none of picture_id; .* register_family\(Family\(visual_ids="):
        attached(model_of(smolvlm), SCHEDULE)
    with pytest.raises(TypeError, match=r"family is a str; pass a toprl_models\.Family"):
        register_family(name)


# --- a class whose attention is not causal everywhere ---


@pytest.mark.parametrize("policy", [FastV(), PyramidDrop("original")], ids=["FastV", "PyramidDrop"])
def test_scores_use_the_rotary_tables_of_their_layers_kind(policy: Policy) -> None:
    """Layers 2 and 3 are of two kinds; either policy asks at one of them on the sequence of the first stage."""
    register_family(Family("Gemma3ForConditionalGeneration", "Gemma 3", "All tokens of every image."))
    model, inputs = model_of(gemma3, "eager"), gemma3_inputs((2,))
    scores = {}
    # with and without a stage that drops nothing: its segment must not change what a later stage sees
    for stages in (((3, 0.5),), ((1, 1.0), (3, 0.5))):
        with attach(model, policy, schedule=Schedule(stages)) as pruner:
            model(**inputs)
        scores[len(stages)] = pruner.trace[-1].scores
    torch.testing.assert_close(scores[2], scores[1], atol=1e-6, rtol=1e-4)
    if isinstance(policy, FastV):
        weights = model(**inputs, output_attentions=True).attentions[2][0, :, -1].mean(0)
        torch.testing.assert_close(scores[1][0], weights[inputs["input_ids"][0] == IMAGE_ID], atol=1e-6, rtol=1e-4)


def test_renumbered_positions_have_the_rotary_tables_of_each_kind() -> None:
    """The unattached decoder, given the survivors alone, their part of its masks, and positions from 0."""
    model, inputs, given = model_of(gemma3, "eager"), gemma3_inputs((2,)), {}
    policy, decoder = HashPolicy(), decoder_of(model)
    policy.positions = "renumbered"
    hook = decoder.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    with attach(model, policy, schedule=Schedule(((0, 0.5),))) as pruner:
        states = model.base_model(**inputs).last_hidden_state
    hook.remove()
    alive = kept_slots(inputs, pruner.trace[0])[0]
    short = decoder(
        inputs_embeds=given["inputs_embeds"][:, alive],
        attention_mask={kind: mask[..., alive, :][..., alive] for kind, mask in given["attention_mask"].items()},
        position_ids=torch.arange(int(alive.sum()))[None],
    )
    torch.testing.assert_close(states[:, alive], short.last_hidden_state, atol=1e-5, rtol=1e-5)
