"""Several prompts in one row: each is pruned as it is alone, whatever tells transformers where they begin."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import flash_stand_in
from tests.models.agreement import last_states, model_of
from tests.models.conftest import HashPolicy
from tests.models.features import crossed
from tests.models.test_prompt_end import READERS, conditioned
from tests.models.tiny_families import PAD_ID, TOKEN_ARGUMENTS, build_inputs, build_model, tiny_family, visual_mask
from tests.models.zoo.idefics import by_row
from tests.models.zoo.minicpm import strip
from toprl_models import FastV, Policy, PyramidDrop, Schedule, attach

ROWS = (("image",), ("image", "image"), (), ("image",))
# three stages, the first between Qwen3-VL's deepstack layers; the readers among the policies have one
STAGES = Schedule(((1, 0.5), (3, 0.25), (5, 2)))
ONE_STAGE = Schedule(((3, 4),))


class Mean(Policy):
    """Scores by the distance from the mean of the prompt's tokens, which other prompts must not enter."""

    def score(self, context: Any) -> Tensor:
        weight = context.valid_mask[..., None].float()
        mean = (context.hidden_states * weight).sum(1) / weight.sum(1).clamp(min=1)
        return (context.hidden_states - mean[:, None]).norm(dim=-1) + context.text_state.norm(dim=-1)[:, None]


def exhaustive(family: str) -> Any:
    return pytest.param(family, marks=pytest.mark.exhaustive)


def alone(family: str) -> list[dict[str, Tensor]]:
    """One prompt per entry, each a batch of its own."""
    return [build_inputs(family, (row,), seed=number) for number, row in enumerate(ROWS)]


# of pixel_values where it is not the first: [rows, images, ...] in SmolVLM, one strip of patches in MiniCPM-V
AXIS_OF_IMAGES = {by_row: 1, strip: -1}


def packed(family: str, model: Any, told_by: str) -> dict[str, Any]:
    """The same prompts in one row."""
    prompts = alone(family)
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    inputs: dict[str, Any] = {"input_ids": torch.cat([prompt["input_ids"] for prompt in prompts], 1)}
    for name in dict.fromkeys(name for prompt in prompts for name in prompt if name not in ("input_ids",)):
        if name in TOKEN_ARGUMENTS:
            inputs[name] = torch.cat([prompt[name] for prompt in prompts], 1)
        else:
            parts = [prompt[name] for prompt in prompts if name in prompt]
            axis = AXIS_OF_IMAGES.get(tiny_family(family).finish, 0) if name == "pixel_values" else 0
            inputs[name] = torch.cat(parts, axis)
    del inputs["attention_mask"]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    if hasattr(model.base_model, "get_rope_index"):  # planes of M-RoPE, and the text's in front of them
        planes = [
            model.base_model.get_rope_index(
                prompt["input_ids"],
                mm_token_type_ids=prompt["mm_token_type_ids"],
                image_grid_thw=prompt.get("image_grid_thw"),
                attention_mask=prompt["attention_mask"],
            )[0]
            for prompt in prompts
        ]
        positions = torch.cat([positions[None], torch.cat(planes, -1)])
    inputs |= {"position_ids": positions, "use_cache": False}
    if told_by == "cu_seq_lens":
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        longest = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, **longest}
    if told_by == "4-D mask":
        number = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])
        visual = visual_mask(inputs)[0]
        image = torch.where(visual, (~visual).cumsum(0), -1 - torch.arange(len(number)))  # marks stand around each
        together = {"": number < 0, "image": image[:, None] == image, "prompt": number >= 0}[tiny_family(family).blocks]
        seen = (number[:, None] == number) & (torch.ones(len(number), len(number)).tril().bool() | together)
        inputs["attention_mask"] = seen[None, None]
        if model.config.get_text_config()._attn_implementation == "eager":
            inputs["attention_mask"] = torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return inputs


def assert_each_is_alone(family: str, model: Any, make: Any, schedule: Schedule, told_by: str) -> None:
    """Kept tokens, states and the loss of packed prompts are those of each prompt in a row of its own."""
    inputs, prompts = packed(family, model, told_by), alone(family)
    with attach(model, make(), schedule=schedule) as pruner:
        rows = []
        for prompt in prompts:
            states = last_states(model, **prompt, use_cache=False)[0]
            rows.append((states, pruner.trace))
        states, trace = last_states(model, **inputs)[0], pruner.trace
    pieces = states.split([prompt["input_ids"].shape[1] for prompt in prompts])
    stage_numbers = range(len(schedule))
    for number, (piece, (expected, trace_alone)) in enumerate(zip(pieces, rows, strict=True)):
        torch.testing.assert_close(piece, expected, atol=1e-4, rtol=1e-4)
        for stage in stage_numbers if trace_alone else ():
            kept = trace[stage].indices[number]
            assert torch.equal(kept[kept >= 0], trace_alone[stage].indices[0])
    assert trace[0].num_visual == tuple(int(visual_mask(prompt).sum()) for prompt in prompts)
    plain = last_states(model, **inputs)[0]
    assert (states - plain)[states.any(-1)].abs().max() > 0.1  # pruning matters


def policies() -> dict[str, tuple[Any, Schedule]]:
    return {
        "stages": (HashPolicy, STAGES),
        "mean": (Mean, STAGES),
        "original": (lambda: PyramidDrop("original"), STAGES),
        **{name: (make, ONE_STAGE) for name, make in READERS.items()},
        "toprl_text": (conditioned, ONE_STAGE),
    }


@crossed("several prompts packed into a row", "told_by backend", ["4-D mask", "position_ids"], ["sdpa", "eager"])
def test_packed_prompts_are_each_alone(family: str, told_by: str, backend: str) -> None:
    model = model_of(family, backend)
    if tiny_family(family).blocks and told_by == "position_ids":
        # transformers mixes up the blocks of packed prompts, unpruned too: they need a mask
        whole = last_states(model, **packed(family, model, told_by))[0]
        apart = torch.cat([last_states(model, **prompt, use_cache=False)[0] for prompt in alone(family)])
        assert (whole - apart).abs().max() > 0.1
        return
    for make, schedule in policies().values():
        assert_each_is_alone(family, model, make, schedule, told_by)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_under_flex_attention(family: str) -> None:
    with torch.compiler.set_stance("force_eager"):
        for make, schedule in policies().values():
            assert_each_is_alone(family, model_of(family, "flex_attention"), make, schedule, "position_ids")


@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_under_flash_attention(family: str, told_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = flash_stand_in.install(monkeypatch)
    model = build_model(family, "flash_attention_2")
    for make, schedule in policies().values():
        assert_each_is_alone(family, model, make, schedule, told_by)
    assert calls["flash_attn_varlen_func"]


@pytest.mark.parametrize("told_by", ["4-D mask", "position_ids"])
def test_the_loss_is_that_of_the_prompts(told_by: str) -> None:
    model, prompts = model_of("llava"), alone("llava")
    inputs = packed("llava", model, told_by)

    def labels_of(ids: Tensor) -> Tensor:
        labels = torch.full_like(ids, -100)
        labels[:, -2:] = ids[:, -2:]
        return labels

    labels = torch.cat([labels_of(prompt["input_ids"]) for prompt in prompts], 1)
    for make, schedule in policies().values():
        with attach(model, make(), schedule=schedule):
            packed_loss = model(**inputs, labels=labels).loss
            losses = [model(**prompt, labels=labels_of(prompt["input_ids"])).loss for prompt in prompts]
        torch.testing.assert_close(packed_loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("told_by", ["4-D mask", "position_ids"])
def test_mask_mode_refuses(told_by: str) -> None:
    model = model_of("llava")
    inputs = packed("llava", model, told_by)
    with attach(model, HashPolicy(), schedule=STAGES, mode="mask"), pytest.raises(ValueError, match="packed"):
        model(**inputs)


@pytest.mark.parametrize("family", ["lfm2_vl", *map(exhaustive, ("qwen3_5", "qwen3_5_moe", "minicpmv4_6"))])
def test_layers_with_a_state_refuse(family: str) -> None:
    """Their states run on from one prompt into the next, so that unpruned prompts are not each alone either."""
    model = model_of(family)
    inputs, last = packed(family, model, "position_ids"), alone(family)[-1]
    states = last_states(model, **inputs)[:, -last["input_ids"].shape[1] :]
    assert (states - last_states(model, **last)).abs().max() > 0.1
    with attach(model, HashPolicy(), schedule=STAGES), pytest.raises(ValueError, match="give each prompt a row"):
        model(**inputs)


def test_a_mask_of_another_pattern_is_refused() -> None:
    """Questions that share an image but do not see each other: no stage could tell what one prompt is."""
    model, prompt = model_of("llava"), build_inputs("llava")
    length = prompt["input_ids"].shape[1]
    seen = torch.ones(length, length).tril().bool()
    seen[-1, -3:-1] = False
    with (
        attach(model, HashPolicy(), schedule=STAGES),
        pytest.raises(ValueError, match="4-D and neither causal nor that of several prompts"),
    ):
        model(**prompt | {"attention_mask": seen[None, None]})


def test_a_causal_4d_mask_is_one_prompt() -> None:
    model, prompt = model_of("llava"), build_inputs("llava")
    length = prompt["input_ids"].shape[1]
    seen = torch.ones(length, length).tril().bool()[None, None]
    with attach(model, HashPolicy(), schedule=STAGES) as pruner:
        logits = model(**prompt).logits
        again = model(**prompt | {"attention_mask": seen}).logits
    assert len(pruner.trace[0].counts) == 1
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.since("5.23")  # an older release checkpoints hooks too, which is refused
def test_checkpointing_switches_the_cache_off_and_packs() -> None:
    """transformers packs by position_ids then, though nobody said use_cache=False."""
    model = build_model("llava").train()
    inputs = packed("llava", model, "position_ids")
    expected = []
    with attach(model, HashPolicy(), schedule=ONE_STAGE) as pruner:
        for prompt in alone("llava"):
            model(**prompt, use_cache=False)
            expected += [stage.counts[0] for stage in pruner.trace] or [0]
        del inputs["use_cache"]
        model.gradient_checkpointing_enable()
        model(**inputs)
    assert list(pruner.trace[0].counts) == expected


def test_the_prompts_lengths_count_from_their_first_token() -> None:
    """Also where a row begins with padding."""
    model = model_of("llava")
    prompt = build_inputs("llava")
    length, padding = prompt["input_ids"].shape[1], 3
    number = torch.cat([torch.full((padding,), -1), torch.zeros(length), torch.ones(length)])
    seen = (number[:, None] == number) & (number >= 0) & torch.ones(len(number), len(number)).tril().bool()
    ids = torch.cat([torch.full((1, padding), PAD_ID), prompt["input_ids"], prompt["input_ids"]], 1)
    row = {
        "input_ids": ids,
        "attention_mask": seen[None, None],
        "pixel_values": prompt["pixel_values"].repeat(2, 1, 1, 1),
        "position_ids": torch.cat([torch.zeros(padding), torch.arange(length).repeat(2)]).long()[None],
    }
    with attach(model, FastV(), schedule=ONE_STAGE) as pruner:
        model(**prompt, prompt_length=length - 2)
        expected = pruner.trace[0]
        model(**row, use_cache=False, prompt_length=torch.tensor([length - 2] * 2))
    for scores in pruner.trace[0].scores:
        torch.testing.assert_close(scores, expected.scores[0], atol=1e-6, rtol=0)
