"""Stages before and between the layers at which a decoder adds features of the vision tower to its visual slots.

Against the unattached decoder on inputs that are cut by hand, and against its eager attention with closed masks.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.models.agreement import assert_agreement, attached, kept_slots, masked_by_hand, run
from tests.models.tiny_families import (
    BOS_ID,
    HIDDEN_SIZE,
    IMAGE_ID,
    PAD_ID,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    build_inputs,
    clip_config,
    text_config,
)
from toprl_models import Family, FastV, Schedule, attach, families, register_family
from toprl_models.probe import decoder_of

BATCH = (("image",), ("image", "image"), ())
VIDEOS = (("video",), ("image", "video"))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
BEFORE = Schedule(((0, 0.5),))
BETWEEN = Schedule(((1, 0.5), (2, 0.25), (5, 2)))
MROPE = {"rope_type": "default", "mrope_section": [3, 3, 2], "mrope_interleaved": True}
TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": HIDDEN_SIZE,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
IDS = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID}
MARKS = {"vision_start_token_id": VISION_START_ID, "vision_end_token_id": VISION_END_ID}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    for name in KIN:
        register_family(Family(f"{name}ForConditionalGeneration", name, "All tokens."))


def qwen3_vl(**changes: Any) -> Any:
    text = text_config(head_dim=16, rope_parameters=dict(MROPE)) | changes
    return transformers.Qwen3VLConfig(text_config=text, vision_config=dict(TOWER), **IDS, **MARKS)


def qwen3_vl_moe() -> Any:
    text = text_config(head_dim=16, rope_parameters=dict(MROPE), **EXPERTS)
    return transformers.Qwen3VLMoeConfig(text_config=text, vision_config=dict(TOWER), **IDS, **MARKS)


def qwen3_omni() -> Any:
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    text = text_config(head_dim=16, rope_parameters=dict(MROPE), **EXPERTS)
    audio = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32}
    audio |= {"num_mel_bins": 16, "output_dim": HIDDEN_SIZE, "downsample_hidden_size": 16}
    return Qwen3OmniMoeThinkerConfig(text_config=text, vision_config=dict(TOWER), audio_config=audio, **IDS, **MARKS)


def cosmos3() -> Any:
    text = text_config(head_dim=16, rope_parameters=dict(MROPE), model_type="qwen3_vl_text")
    tower = {"model_type": "qwen3_vl_vision", **TOWER}
    return transformers.Cosmos3OmniConfig(text_config=text, vision_config=tower, **IDS, **MARKS)


def cohere_compass() -> Any:
    text = text_config(rope_parameters={"full_attention": MROPE | {"rope_theta": 1e4}}, logit_scale=1.0)
    return transformers.CohereCompassConfig(text_config=text, vision_config=dict(TOWER), **IDS, **MARKS)


def granite_docling() -> Any:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    tower = {name: clip_config()[name] for name in names} | {"out_hidden_size": HIDDEN_SIZE, "scale_factor": 2}
    tower |= {"deepstack_visual_indexes": [0, 1], "use_fine_route": False}
    return transformers.GraniteDoclingConfig(
        text_config=text_config(residual_multiplier=1.0, attention_multiplier=0.25),
        vision_config=tower,
        image_token_id=IMAGE_ID,
        pad_token_id=PAD_ID,
    )


def granite4_vision() -> Any:
    tower = {name: value for name, value in clip_config().items() if name != "model_type"} | {"hidden_size": 64}
    return transformers.Granite4VisionConfig(
        text_config=text_config(attention_multiplier=0.25),
        vision_config=tower,
        image_token_index=IMAGE_ID,
        downsample_rate="1/2",
        # vision layer, decoder layer
        deepstack_layer_map=[[0, 0], [1, 1], [2, 4]],
        spatial_target_layers=[2, 3],
        image_grid_pinpoints=[[32, 64], [64, 32]],
    )


def qwen_inputs(batch: Any = BATCH) -> dict[str, Tensor]:
    return build_inputs("qwen3_vl", batch)


def omni_inputs() -> dict[str, Tensor]:
    inputs = qwen_inputs()
    del inputs["mm_token_type_ids"]
    return inputs


def granite_inputs(per_image: int, *size: int, **others: Tensor) -> dict[str, Any]:
    """Two rows of one image, the second with more text."""
    image = [VISION_START_ID, *[IMAGE_ID] * per_image, VISION_END_ID]
    rows = [[BOS_ID, *image, 7, 8], [BOS_ID, 20, 21, *image, 9, 10, 11, 12]]
    length = max(map(len, rows))
    ids = torch.tensor([[PAD_ID] * (length - len(row)) + row for row in rows])
    values = torch.randn(*size, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": (ids != PAD_ID).long(), "pixel_values": values, **others}


def granite_docling_inputs() -> dict[str, Any]:
    real = torch.ones(2, 1, dtype=torch.bool)
    return granite_inputs(4, 2, 1, 3, 32, 32, pixel_attention_mask=real)


def granite4_inputs() -> dict[str, Any]:
    return granite_inputs(4 + 2 * 5, 2, 3, 3, 32, 32, image_sizes=torch.tensor([[32, 64]] * 2))


KIN: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "Qwen3VL": (qwen3_vl, qwen_inputs),
    "Qwen3VLMoe": (qwen3_vl_moe, qwen_inputs),
    "Qwen3OmniMoeThinker": (qwen3_omni, omni_inputs),
    "Cosmos3Omni": (cosmos3, qwen_inputs),
    "CohereCompass": (cohere_compass, qwen_inputs),
    "GraniteDocling": (granite_docling, granite_docling_inputs),
    "Granite4Vision": (granite4_vision, granite4_inputs),
}


def make(config: Any, name: str) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval().requires_grad_(False)
    for parameter in model.base_model.parameters():  # planes about as large as the states that they are added to
        if parameter.ndim > 1:
            parameter += 0.05 * torch.randn_like(parameter)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD_ID
    return model


@functools.cache
def model_of(name: str, attn_implementation: str = "sdpa") -> Any:
    model = make(KIN[name][0](), name)
    model.set_attn_implementation({"text_config": attn_implementation})
    return model


def decoder_arguments(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the decoder of the unattached model is called with."""
    seen: dict[str, Any] = {}
    handle = decoder_of(model).register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model.base_model(**inputs)
    handle.remove()
    return seen


def by_hand(model: Any, arguments: dict[str, Any], alive: Tensor, row: int) -> Any:
    """Output of the unattached decoder on the slots [N] of ``row`` that ``alive`` [B, N] leaves."""
    keep, batch, length = alive[row], *alive.shape
    positions = arguments.get("position_ids")
    positions = torch.arange(length).expand(batch, -1) if positions is None else positions
    cut = {
        "inputs_embeds": arguments["inputs_embeds"][row : row + 1, keep],
        "position_ids": positions[..., row : row + 1, keep],
        "attention_mask": torch.ones(1, int(keep.sum()), dtype=torch.int64),  # gaps in positions are no packing
    }
    this = torch.zeros_like(alive)
    this[row] = keep
    if "vision_mask" in arguments:
        rows = this[arguments["vision_mask"][..., 0]]
        cut["vision_mask"] = arguments["vision_mask"][row : row + 1, keep]
        cut["deepstack_features"] = {layer: plane[rows] for layer, plane in arguments["deepstack_features"].items()}
    else:
        rows = this[arguments["visual_pos_masks"]]
        cut["visual_pos_masks"] = arguments["visual_pos_masks"][row : row + 1, keep]
        cut["deepstack_visual_embeds"] = [plane[rows] for plane in arguments["deepstack_visual_embeds"]]
    return model.get_decoder()(**cut, output_hidden_states=True)


def in_float64(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # the other kernels of experts know no float64
    return model, {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def assert_cut_by_hand(model: Any, inputs: dict[str, Any]) -> None:
    """In float64 but for the models' norms, which compute in float32."""
    model, inputs = in_float64(model, inputs)
    arguments = decoder_arguments(model, inputs)
    with attached(model, BEFORE) as pruner:
        output = model.base_model(**inputs, output_hidden_states=True)
    alive = kept_slots(inputs, pruner.trace[0])
    assert int(alive.sum()) < int(inputs["attention_mask"].sum())
    for row in range(len(alive)):
        expected = by_hand(model, arguments, alive, row)
        torch.testing.assert_close(output.last_hidden_state[row, alive[row]], expected.last_hidden_state[0], **CLOSE)
        for states, short in zip(output.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(states[row, alive[row]], short[0], **CLOSE)


# the other classes are younger than the oldest supported transformers, or were rewritten since
MARKS_OF: dict[str, Any] = {name: [pytest.mark.since("5.23"), pytest.mark.exhaustive] for name in KIN}
MARKS_OF["Qwen3VL"] = ()
MARKS_OF["Granite4Vision"] = pytest.mark.since("5.23")  # the other form of planes
each = pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in MARKS_OF.items()])


@each
def test_before_the_model_the_planes_are_cut_with_their_tokens(name: str) -> None:
    assert_cut_by_hand(model_of(name), KIN[name][1]())


@each
def test_the_planes_matter(name: str) -> None:
    """Else the tests above could not fail."""
    model, inputs = model_of(name), KIN[name][1]()
    arguments, alive = decoder_arguments(model, inputs), inputs["attention_mask"].bool()
    plain = by_hand(model, arguments, alive, 0).last_hidden_state
    if "vision_mask" in arguments:
        features = arguments["deepstack_features"]
        parts = [{**features, layer: torch.zeros_like(plane)} for layer, plane in features.items()]
    else:
        planes = arguments["deepstack_visual_embeds"]
        parts = [[0 * plane if i == j else plane for i, plane in enumerate(planes)] for j in range(len(planes))]
    for part in parts:
        key = "deepstack_features" if "vision_mask" in arguments else "deepstack_visual_embeds"
        other = by_hand(model, arguments | {key: part}, alive, 0).last_hidden_state
        assert (other - plain).abs().amax() > 0.05


@each
def test_stages_between_the_planes(name: str) -> None:
    """Against the unattached model under eager attention whose masks lose the dropped keys."""
    model, inputs = model_of(name), KIN[name][1]()
    with attached(model, BETWEEN) as pruner:
        states = model.base_model(**inputs).last_hidden_state
    alive = kept_slots(inputs, pruner.trace[-1])
    expected = masked_by_hand(model_of(name, "eager"), inputs, pruner.trace)
    torch.testing.assert_close(states[alive], expected[alive], atol=1e-4, rtol=1e-4)


@each
def test_compact_is_mask(name: str) -> None:
    assert_agreement(model_of(name), KIN[name][1](), Schedule(((0, 0.5), (2, 0.25), (5, 2))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each
def test_keep_all_is_the_unattached_model(name: str, dtype: torch.dtype) -> None:
    """Bitwise, in all hidden states."""
    model, inputs = copy.deepcopy(model_of(name)).to(dtype), KIN[name][1]()
    plain = model(**inputs, output_hidden_states=True)
    with attached(model, Schedule(((0, 1.0), (1, 1.0), (5, 1.0)))):
        output = model(**inputs, output_hidden_states=True)
    assert torch.equal(output.logits, plain.logits)
    assert all(map(torch.equal, output.hidden_states, plain.hidden_states))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_prompt_is_bitwise_the_prompt_cut_by_hand(dtype: torch.dtype) -> None:
    model, inputs = copy.deepcopy(model_of("Qwen3VL")).to(dtype), qwen_inputs((("image", "image"),))
    arguments = decoder_arguments(model, inputs)
    with attached(model, BEFORE) as pruner:
        output = model.base_model(**inputs, output_hidden_states=True)
    alive = kept_slots(inputs, pruner.trace[0])
    expected = by_hand(model, arguments, alive, 0)
    for states, short in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(states[0, alive[0]], short[0])


@pytest.mark.parametrize("batch", [(("video",), ("image", "video")), (("video", "video"),), (("image",), ())])
def test_videos_and_text_alone(batch: Any) -> None:
    model, inputs = model_of("Qwen3VL"), qwen_inputs(batch)
    assert_cut_by_hand(model, inputs)
    with attached(model, BETWEEN) as pruner:
        states = model.base_model(**inputs).last_hidden_state
    alive = kept_slots(inputs, pruner.trace[-1])
    expected = masked_by_hand(model_of("Qwen3VL", "eager"), inputs, pruner.trace)
    torch.testing.assert_close(states[alive], expected[alive], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_plane_after_the_last_layer(layer: int) -> None:
    """Three layers and three planes: the last plane has no layer after it."""
    model = make(qwen3_vl(num_hidden_layers=3), "Qwen3VL")
    inputs = qwen_inputs()
    if not layer:
        assert_cut_by_hand(model, inputs)
    schedule = Schedule(((layer, 0.5),))
    compact, mask = run(model, inputs, schedule), run(model, inputs, schedule, "mask")
    alive = kept_slots(inputs, compact.trace[0])
    torch.testing.assert_close(compact.states[alive], mask.states[alive], atol=1e-4, rtol=1e-4)
    assert (compact.states - run(model, inputs).states)[alive].abs().max() > 0.1


@pytest.mark.since("5.23")  # checkpoints layers, whose hooks earlier releases run twice
@pytest.mark.parametrize("schedule", [BEFORE, BETWEEN], ids=["before", "between"])
def test_gradients(schedule: Schedule) -> None:
    """Of the planes' mergers: compact mode against mask mode, and with gradient checkpointing of the layers."""
    model, inputs = copy.deepcopy(model_of("Qwen3VL")).requires_grad_(True), qwen_inputs()
    gradients = {}
    for case in ("compact", "mask", "checkpointing"):
        if case == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        model.zero_grad()
        with attached(model, schedule, "mask" if case == "mask" else "compact") as pruner:
            states = model.base_model(**inputs, use_cache=False).last_hidden_state
            states = states[kept_slots(inputs, pruner.trace[-1])]
            (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        gradients[case] = [p.grad.clone() for p in model.base_model.visual.deepstack_merger_list.parameters()]
    for compact, mask, again in zip(*gradients.values(), strict=True):
        assert compact.abs().max() > 1e-2
        torch.testing.assert_close(compact, mask, atol=1e-4 * float(compact.abs().max()), rtol=1e-4)
        torch.testing.assert_close(again, compact, atol=1e-6 * float(compact.abs().max()), rtol=1e-5)


def test_the_attention_that_is_asked_for_has_seen_the_planes() -> None:
    """FastV between the planes scores by the attention of an eager model without a stage."""
    model, inputs = model_of("Qwen3VL", "eager"), qwen_inputs((("image",),))
    attentions = model.base_model(**inputs, output_attentions=True).attentions
    for layer in (1, 2, 3):
        # a first stage that drops nothing leaves the later planes to the pruner
        with attach(model, FastV(), schedule=Schedule(((1, 1.0), (layer + 1, 0.5)))) as pruner:
            model(**inputs)
        expected = attentions[layer][0, :, -1].mean(0)[inputs["input_ids"][0] == IMAGE_ID]
        torch.testing.assert_close(pruner.trace[-1].scores[0], expected, atol=1e-6, rtol=1e-4)


def test_a_fixed_prompt_takes_the_planes_of_each_pass() -> None:
    model, first = model_of("Qwen3VL"), qwen_inputs()
    second = first | {"pixel_values": first["pixel_values"].flip(0)}
    with attached(model, Schedule(((0, 0.5), (2, 0.25)))) as pruner:
        expected = [model(**inputs).logits for inputs in (first, second)]
        with pruner.fixed_prompt():
            logits = [model(**inputs).logits for inputs in (first, second)]
    assert all(map(torch.equal, logits, expected))
    assert not torch.equal(*logits)


@pytest.mark.since("5.23")
def test_arguments_of_the_caller_stay() -> None:
    """Features that were encoded ahead of time serve several passes."""
    model, inputs = model_of("Qwen3VL"), qwen_inputs((("image",),))
    with attached(model, BEFORE):
        expected = model(**inputs).logits
        pixels, grid = inputs.pop("pixel_values"), inputs["image_grid_thw"]
        encoded = {"image": model.base_model.get_image_features(pixels, grid, return_dict=True)}
        for _ in range(2):
            assert torch.equal(model(**inputs, mm_encoder_outputs=encoded).logits, expected)
