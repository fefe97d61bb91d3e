"""Vision towers of every build: what is read of them, against gradients and attention by hand in float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import interpolate

from tests.models.test_vision_methods import sharpen, tower_of, zipped_by_loops
from tests.models.tiny_families import (
    BOS_ID,
    FIRST_WORD,
    IMAGE_ID,
    LAST_WORD,
    PAD_ID,
    TINY,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    build_inputs,
    build_model,
    text_config,
    visual_mask,
)
from toprl_models import Family, Schedule, attach
from toprl_models.families import FAMILIES
from toprl_models.methods._layout import layout_of
from toprl_models.methods._smaller import resized
from toprl_models.methods._tower import TowerReader, tile_shares
from toprl_models.methods.downsample import Downsample
from toprl_models.methods.fastervlm import FasterVLM
from toprl_models.methods.visionzip import VisionZip

ATOL = 1e-4
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP = {**SIZES, "image_size": 32, "patch_size": 4, "vision_use_head": False}
# pictures of each row
ROWS = ((0,), (1, 2), ())
PIXTRAL_SIZES = [(32, 48), (16, 32), (48, 16)]  # height and width
QWEN_GRIDS = [(1, 8, 8), (1, 4, 12), (1, 8, 12)]


# --- models that have no row of their own in tiny_families ---


def llava_with(vision: Any, **options: Any) -> Any:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text_config()),
        vision_config=vision,
        image_token_id=IMAGE_ID,
        **{"vision_feature_layer": -1, "vision_feature_select_strategy": "full", **options},
    )
    return transformers.LlavaForConditionalGeneration(config)


def llava_siglip() -> Any:
    return llava_with(transformers.SiglipVisionConfig(**{**SIGLIP, "patch_size": 8}), vision_feature_layer=-2)


def pixtral_config() -> Any:
    return transformers.PixtralVisionConfig(**SIZES, image_size=64, patch_size=8)


def llava_pixtral() -> Any:
    return llava_with(pixtral_config())


def mistral3() -> Any:
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**text_config(head_dim=16)),
        vision_config=pixtral_config(),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
        spatial_merge_size=2,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def smolvlm() -> Any:
    vision = {key: value for key, value in SIGLIP.items() if key != "vision_use_head"}
    config = transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**text_config()),
        vision_config=vision,
        image_token_id=IMAGE_ID,
        scale_factor=2,
        pad_token_id=PAD_ID,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def gemma3() -> Any:
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text_config(head_dim=16, sliding_window=500)),
        vision_config=transformers.SiglipVisionConfig(**SIGLIP),
        mm_tokens_per_image=16,
        image_token_index=IMAGE_ID,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros by themselves
    return model


def aya_vision() -> Any:
    config = transformers.AyaVisionConfig(
        text_config=transformers.Cohere2Config(**text_config(head_dim=16)),
        vision_config=transformers.SiglipVisionConfig(**SIGLIP),
        image_token_index=IMAGE_ID,
        downsample_factor=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return transformers.AyaVisionForConditionalGeneration(config)


def qwen2_vl() -> Any:
    config = transformers.Qwen2VLConfig(
        text_config=text_config(rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]}),
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
        },
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def fixed_size(model: Any) -> tuple[list[int], dict[str, Tensor]]:
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return [16] * 3, {"pixel_values": pixels}


def by_rows(model: Any) -> tuple[list[int], dict[str, Tensor]]:
    """The first axis of the pixels is that of the rows, and missing pictures are zeros."""
    lengths, inputs = fixed_size(model)
    pixels = torch.zeros(3, 2, 3, 32, 32)
    pixels[0, 0], pixels[1] = inputs["pixel_values"][0], inputs["pixel_values"][1:]
    return lengths, {"pixel_values": pixels}


def any_size(model: Any) -> tuple[list[int], dict[str, Tensor]]:
    pixels = torch.zeros(3, 3, 48, 48)
    generator, merge = torch.Generator().manual_seed(0), getattr(model.config, "spatial_merge_size", 1)
    for picture, (height, width) in zip(pixels, PIXTRAL_SIZES, strict=True):
        picture[:, :height, :width] = torch.randn(3, height, width, generator=generator)
    lengths = [height * width // (8 * merge) ** 2 for height, width in PIXTRAL_SIZES]
    return lengths, {"pixel_values": pixels, "image_sizes": torch.tensor(PIXTRAL_SIZES)}


def grids(model: Any) -> tuple[list[int], dict[str, Tensor]]:
    generator, patches = torch.Generator().manual_seed(0), sum(height * width for _, height, width in QWEN_GRIDS)
    pixels = torch.randn(patches, 3 * 2 * 4 * 4, generator=generator)
    lengths = [height * width // 4 for _, height, width in QWEN_GRIDS]
    return lengths, {"pixel_values": pixels, "image_grid_thw": torch.tensor(QWEN_GRIDS)}


class Build(NamedTuple):
    make: Callable[[], Any]
    pictures: Callable[[Any], tuple[list[int], dict[str, Tensor]]]


BUILDS = {
    "llava_siglip": Build(llava_siglip, fixed_size),
    "llava_pixtral": Build(llava_pixtral, any_size),
    "mistral3": Build(mistral3, any_size),
    "smolvlm": Build(smolvlm, by_rows),
    "gemma3": Build(gemma3, fixed_size),
    "aya_vision": Build(aya_vision, fixed_size),
    "qwen2_vl": Build(qwen2_vl, grids),
}
TOWERS = [*BUILDS, *TINY]
# a stage at layer 0 is possible, and the test's models are those of register_family()
ATTACHED = ["llava_siglip", "llava_pixtral", "mistral3", "smolvlm", "qwen2_vl", "llava_onevision", "qwen2_5_vl"]
ATTACHED += ["internvl", *(["qwen3_vl"] if TINY["qwen3_vl"].min_stage == 0 else [])]


@pytest.fixture(autouse=True)
def rows_of_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mistral3", "smolvlm", "qwen2_vl"):
        kind = type(model_of(name)).__name__
        monkeypatch.setitem(FAMILIES, kind, Family(kind, name, "All tokens."))


@functools.cache
def model_of(name: str) -> Any:
    if name in BUILDS:
        torch.manual_seed(0)
        model = BUILDS[name].make().eval().requires_grad_(False)
        model.generation_config.pad_token_id = PAD_ID
    else:
        model = build_model(name)
    sharpen(tower_of(model), 3)
    return model


def inputs_of(name: str) -> dict[str, Tensor]:
    """Left-padded prompts with one, two and no pictures."""
    if name not in BUILDS:
        return build_inputs(name, (("image",), ("image", "image"), ()))
    lengths, inputs = BUILDS[name].pictures(model_of(name))
    generator, prompts = torch.Generator().manual_seed(0), []
    for row, numbers in enumerate(ROWS):
        ids = [BOS_ID]
        for number in numbers:
            ids += [VISION_START_ID, *[IMAGE_ID] * lengths[number], VISION_END_ID]
        prompts.append(ids + torch.randint(FIRST_WORD, LAST_WORD, (4 + row,), generator=generator).tolist())
    length = max(map(len, prompts))
    ids = torch.tensor([[PAD_ID] * (length - len(prompt)) + prompt for prompt in prompts])
    inputs |= {"input_ids": ids, "attention_mask": (ids != PAD_ID).long()}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE_ID).int()
    return inputs


def encode(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Features [S, d] of all visual slots, newlines included."""
    names = ("pixel_values", "pixel_values_images", "image_grid_thw", "image_sizes", "batch_num_images")
    given = {name: inputs[name] for name in names if name in inputs}
    pixels = given.pop("pixel_values", given.pop("pixel_values_images", None))
    output = model.base_model.get_image_features(pixels, **given, return_dict=True).pooler_output
    return torch.cat([picture.flatten(0, -2) for picture in output])


# --- by hand: attention from the weights, and patches of a token from gradients ---


def layers_of(tower: Any) -> Any:
    paths = ("encoder.layers", "encoder.layer", "transformer.layers", "blocks")
    for path in (*paths, "vision_model.encoder.layers", "transformer.encoder.layers"):
        try:
            return tower.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError("no layers")


def chosen_layer(model: Any) -> Any:
    layers = layers_of(tower_of(model))
    return layers[getattr(model.config, "vision_feature_layer", -1)]


def qwen_attention(module: Any, states: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What each patch receives, [N], of a block of Qwen, from its qkv weights."""
    query, key, _ = module.qkv(states).view(len(states), 3, module.num_heads, -1).unbind(1)
    cos, sin = (table[:, None] for table in arguments["position_embeddings"])

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    query, key, received = rotated(query), rotated(key), []
    bounds = arguments["cu_seqlens"].tolist()
    for start, stop in itertools.pairwise(bounds):
        part = slice(start, stop)
        logits = torch.einsum("qhd,khd->hqk", query[part], key[part]) / query.shape[-1] ** 0.5
        received.append(logits.softmax(-1).mean((0, 1)))
    return torch.cat(received)


def received_by_hand(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What each patch of all pictures receives, float64 [N], in the order of the tower; the class token's attention."""
    tower, layer, found = tower_of(model), chosen_layer(model), []
    modules = dict(layer.named_modules())
    attention = next(modules[name] for name in ("self_attn", "attention", "attn") if name in modules)
    if hasattr(attention, "qkv"):

        def of_qwen(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            found.append(qwen_attention(module, args[0] if args else kwargs["hidden_states"], kwargs))

        handle = attention.register_forward_hook(of_qwen, with_kwargs=True)
    else:
        tower.set_attn_implementation("eager")
        handle = attention.register_forward_hook(lambda module, args, output: found.append(output[1]))
    try:
        encode(model, inputs)
    finally:
        handle.remove()
        if not hasattr(attention, "qkv"):
            tower.set_attn_implementation("sdpa")
    (weights,) = found
    if weights.ndim == 1:
        return weights
    if any("class_embedding" in name or "cls_token" in name for name, _ in tower.named_parameters()):
        return weights[:, :, 0, 1:].mean(1).flatten()
    received = weights.mean(1).sum(1)
    if len(received) > 1:
        return received.flatten() / weights.shape[-1]
    # the pictures of a packed sequence see themselves alone
    patches = torch.tensor([height * width // 64 for height, width in PIXTRAL_SIZES])
    return received[0] / patches.repeat_interleave(patches)


def patches_of_tokens(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """bool [S, N]: the patches that a visual token is made of, from gradients; all False for newlines."""
    nudges: list[Tensor] = []

    def nudge(module: Any, args: tuple, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        nudges.append(torch.zeros_like(states, requires_grad=True))
        return (states + nudges[0], *output[1:]) if isinstance(output, tuple) else states + nudges[0]

    handle = chosen_layer(model).register_forward_hook(nudge, prepend=True)  # before transformers stores it
    with torch.enable_grad():
        features = encode(model, inputs)
    handle.remove()
    rows = []
    for token in features:
        (gradient,) = torch.autograd.grad((token * torch.arange(1.0, len(token) + 1)).sum(), nudges, retain_graph=True)
        rows.append(gradient.abs().sum(-1) > 0)
    of_tokens = torch.stack(rows)
    if of_tokens.ndim == 3 and of_tokens.shape[2] in (17, 65):  # a class token, of which no visual token is made
        assert not of_tokens[:, :, 0].any()
        of_tokens = of_tokens[:, :, 1:]
    return of_tokens.flatten(1)


def scores_by_hand(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """float64 [S]: the mean of what the patches of each visual token receive; -1 for newlines."""
    double = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    model.double()
    softmax = torch.nn.functional.softmax
    torch.nn.functional.softmax = lambda input, dim, dtype=None: input.softmax(dim)  # eager attention asks for float32
    try:
        received, groups = received_by_hand(model, double), patches_of_tokens(model, double)
    finally:
        torch.nn.functional.softmax = softmax
        model.float()
    number = groups.sum(1)
    return torch.where(number > 0, (groups * received).sum(1) / number.clamp(min=1), -1.0)


def reading_of(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
    """Scores of the visual tokens without a pruner, and the tokens of each picture or tile."""
    reader = TowerReader(model)
    encode(model, inputs)
    values, sizes = reader._of_tokens(reader._recorder.take())
    for handle in reader.handles:
        handle.remove()
    return values[:, 0], sizes


@pytest.mark.parametrize("name", TOWERS)
def test_scores_are_the_towers_own(name: str) -> None:
    model, inputs = model_of(name), inputs_of(name)
    read, sizes = reading_of(model, inputs)
    expected = scores_by_hand(model, inputs)
    assert sum(sizes) == len(read)
    if name in ("llava_next", "llava_onevision"):  # packing drops and interpolates: compared in the model, below
        patches = patches_of_tokens(model, inputs)
        assert (patches.sum(1) <= 1).all()
        read = torch.where(patches.any(1), (patches * read).sum(1), -1.0)
    else:
        assert (expected >= 0).all()
    torch.testing.assert_close(read.double(), expected, atol=1e-7, rtol=1e-5)
    assert expected[expected >= 0].std() > 1e-4  # or any order would do


@pytest.mark.parametrize("name", ["paddleocr_vl", "ovis2"])
def test_the_patches_of_a_token_are_those_that_it_depends_on(name: str) -> None:
    """Patches come row by row, whatever the tower is told of grids."""
    model, inputs = model_of(name), build_inputs(name, (("image",), ("image", "image")))
    layout, tower, seen = layout_of(model), tower_of(model), {}
    hook = tower.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    groups = patches_of_tokens(model, inputs)
    hook.remove()
    arguments = {**seen, "pixel_values": inputs["pixel_values"].shape}
    shares = layout.merged(torch.eye(groups.shape[1]), layout.grids(arguments))
    assert torch.equal(shares > 0, groups)


@pytest.mark.parametrize("name", ["llava_siglip", "mistral3", "smolvlm", "qwen2_5_vl"])
def test_scores_do_not_depend_on_the_backend(name: str) -> None:
    model, inputs = model_of(name), inputs_of(name)
    expected, _ = reading_of(model, inputs)
    tower_of(model).set_attn_implementation("eager")
    try:
        read, _ = reading_of(model, inputs)
    finally:
        tower_of(model).set_attn_implementation("sdpa")
    torch.testing.assert_close(read, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "merge"), [("llava", 1), ("gemma3", 2), ("mistral3", 2), ("internvl", 2)])
def test_many_queries_at_a_time_or_few(name: str, merge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of(name), inputs_of(name)
    assert layout_of(model).merge == merge
    whole, _ = reading_of(model, inputs)
    monkeypatch.setattr("toprl_models.methods._tower.WEIGHTS_AT_ONCE", 1)
    torch.testing.assert_close(reading_of(model, inputs)[0], whole, atol=1e-7, rtol=1e-5)


def test_padded_patches_give_and_get_nothing() -> None:
    """The lower half of SmolVLM's first picture is no picture."""
    model, inputs = model_of("smolvlm"), inputs_of("smolvlm")
    mask = torch.ones(3, 2, 32, 32, dtype=torch.int64)
    mask[0, 0, 16:] = 0
    reader = TowerReader(model)
    model.base_model.get_image_features(inputs["pixel_values"], mask, return_dict=True)
    seen = reader._recorder.take()
    for handle in reader.handles:
        handle.remove()
    read = reader._of_tokens(seen)[0][:, 0].view(3, 4, 4)
    assert (read[0, 2:] == 0).all() and (read[0, :2] > 0).all()
    torch.testing.assert_close(read[0].sum() * 4, torch.tensor(1.0))
    torch.testing.assert_close(read[1].sum() * 4, torch.tensor(1.0))


# --- the methods ---


class Kept:
    """Remembers what the stage saw and decided."""

    def decide(self, context: Any) -> Any:
        self.context, self.decision = context, super().decide(context)  # type: ignore[misc]
        return self.decision


class SeenVisionZip(Kept, VisionZip):
    def _tokens(self, reading: Any, states: Tensor, shares: list[int]) -> Any:
        self.keys = reading.keys
        return super()._tokens(reading, states, shares)


class SeenFasterVLM(Kept, FasterVLM):
    pass


def tiles_by_row(name: str, inputs: dict[str, Tensor], scores: Tensor) -> list[list[Tensor]]:
    """Slots [n] of each tile of each row among the row's visual slots, newlines left out."""
    model = model_of(name)
    _, sizes = reading_of(model, inputs)
    groups = patches_of_tokens(model, inputs)
    patches_of_tile = torch.tensor(sizes) * groups.shape[1] // sum(sizes)
    tile_of_patch = torch.arange(len(sizes)).repeat_interleave(patches_of_tile)
    rows, start = [], 0
    for count in visual_mask(inputs).sum(1).tolist():
        members = groups[start : start + count]
        tile = torch.where(members.any(1), tile_of_patch[members.int().argmax(1)], -1)
        rows.append([(tile == number).nonzero()[:, 0] for number in sorted(set(tile.tolist()) - {-1})])
        start += count
    return rows


@pytest.mark.parametrize("name", ATTACHED)
def test_methods_choose_by_these_scores(name: str) -> None:
    """FasterVLM's slots, VisionZip's, and what it puts there, by loops over the tiles of each row."""
    model, inputs, keep = model_of(name), inputs_of(name), 0.6
    scores = scores_by_hand(model, inputs)
    counts = visual_mask(inputs).sum(1).tolist()
    schedule = Schedule(((0, keep),))
    faster, zipped = SeenFasterVLM(), SeenVisionZip(0.4)
    kept = []
    for policy in (faster, zipped):
        with attach(model, policy, schedule=schedule) as pruner:
            model(**inputs)
            assert pruner.trace[0].counts == tuple(schedule.counts(count)[0] for count in counts)
            kept.append([set(row[row >= 0].tolist()) for row in pruner.trace[0].indices])
    merged = 0
    for row, tiles in enumerate(tiles_by_row(name, inputs, scores)):
        own, states = scores[sum(counts[:row]) : sum(counts[: row + 1])], zipped.context.hidden_states[row]
        best, chosen, capacities = set(), set(), [len(tile) for tile in tiles]
        sizes = [16] * len(tiles) if name == "llava_onevision" else capacities
        for slots, share in zip(tiles, tile_shares(schedule.counts(counts[row])[0], capacities, sizes), strict=True):
            order = own[slots].argsort(descending=True, stable=True)
            best |= set(slots[order[:share]].tolist())
            dominant, contextual = zipped.split(share)
            top = sorted(slots[order[:dominant]].tolist())
            others = [slot for slot in slots.tolist() if slot not in top]
            targets = others[:: max(1, len(others) // contextual)][:contextual] if contextual else []
            chosen |= {*top, *targets}
            tokens = zipped_by_loops(states[slots], zipped.keys[row, slots], own[slots], dominant, contextual)
            torch.testing.assert_close(zipped.decision.states[row, top + targets], tokens, atol=1e-5, rtol=1e-5)
            merged += int(not torch.equal(tokens, states[top + targets]))
        assert kept[0][row] == best and kept[1][row] == chosen
    assert merged


@pytest.mark.parametrize("name", ["mistral3", "qwen2_5_vl", "internvl"])
def test_keys_are_those_of_the_patches_of_a_token(name: str) -> None:
    """The keys that a layer's own attention gets, mean over heads, and over the patches that gradients name."""
    model, inputs = model_of(name), inputs_of(name)
    reader = TowerReader(model)
    encode(model, inputs)
    seen = reader._recorder.take()
    for handle in reader.handles:
        handle.remove()
    read = reader._of_tokens(seen)[0][:, 1:]
    first = int(name == "internvl")
    keys = torch.cat([call.key.mean(1)[:, first:].flatten(0, 1) for call in seen["calls"]])
    groups = patches_of_tokens(model, inputs).float()
    assert (groups.sum(1) == 4).all()
    torch.testing.assert_close(read, groups @ keys / 4, atol=1e-5, rtol=1e-5)


# --- smaller pictures ---


def shortened(model: Any, inputs: dict[str, Tensor], tokens: list[Tensor]) -> Tensor:
    """Last logits of each row with these ``tokens`` [n, d] in place of its visual tokens, row by row."""
    embed, last = model.get_input_embeddings(), []
    for ids, mask, new in zip(inputs["input_ids"], inputs["attention_mask"], tokens, strict=True):
        ids = ids[mask.bool()]
        visual = (ids == IMAGE_ID).nonzero()[:, 0]
        parts = [embed(ids)] if not len(visual) else []
        if len(visual):  # nothing but the marks lies between the pictures
            start, stop = int(visual[0]), int(visual[-1]) + 1
            parts = [embed(ids[:start]), new, embed(ids[stop:])]
        last.append(model(inputs_embeds=torch.cat(parts)[None]).logits[0, -1])
    return torch.stack(last)


def one_row(name: str) -> dict[str, Tensor]:
    """The first row of the prompts, without its padding: a single picture."""
    inputs, lengths = inputs_of(name), {"smolvlm": 1}
    real = inputs["attention_mask"][0].bool()
    inputs["pixel_values"] = inputs["pixel_values"][: lengths.get(name, 1)]
    if "image_sizes" in inputs:
        inputs["image_sizes"] = inputs["image_sizes"][:1]
    return inputs | {key: inputs[key][:1, real] for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("name", ["llava_siglip", "llava_pixtral", "mistral3", "smolvlm"])
def test_downsample_is_the_model_on_a_smaller_picture(name: str) -> None:
    """A third of the tokens: 2 x 2 of 4 x 4; for Pixtral 2 x 3 (of 4 x 6), for Mistral 3 1 x 2 of 2 x 3."""
    model, inputs = model_of(name), one_row(name)
    unit = {"llava_pixtral": 8, "mistral3": 16}.get(name, 8)
    rows, columns = {"llava_pixtral": (2, 4), "mistral3": (1, 2)}.get(name, (2, 2))
    pixels, options = inputs["pixel_values"], {}
    if "image_sizes" in inputs:
        pixels = pixels[:, :, :32, :48]
        options["image_sizes"] = torch.tensor([(rows * unit, columns * unit)])
    elif name == "llava_siglip":
        options["interpolate_pos_encoding"] = True
    small = resized(pixels[0, :1] if pixels.ndim == 5 else pixels, rows * unit, columns * unit)
    small = small[None] if pixels.ndim == 5 else small
    features = model.base_model.get_image_features(small, **options, return_dict=True).pooler_output
    features = torch.cat([one.flatten(0, -2) for one in features])
    assert len(features) == rows * columns
    with attach(model, Downsample(), schedule=Schedule(((0, 0.35),))) as pruner:
        logits = model(**inputs).logits[:, -1]
        assert pruner.trace[0].counts == (rows * columns,)
    torch.testing.assert_close(logits, shortened(model, inputs, [features]), atol=ATOL, rtol=1e-4)


def features_of_tiles(model: Any, tiles: Tensor, side: int) -> Tensor:
    """Features [tiles, side * side, d] of tiles at ``side`` x ``side`` patches of 8 pixels."""
    output = tower_of(model)(
        resized(tiles, 8 * side, 8 * side), interpolate_pos_encoding=True, output_hidden_states=True
    )
    states = output.hidden_states[model.config.vision_feature_layer]
    first = int(model.config.vision_feature_select_strategy == "default")
    return model.base_model.multi_modal_projector(states[:, first:])


# a picture of 32 x 64 pixels, 2 tiles side by side: 16 tokens of the overview, 4 rows of 8 and a newline each
@pytest.mark.parametrize(("budget", "tile_side"), [(45, 3), (30, 2), (19, 1), (17, 0)])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_tiles_shrink_before_the_overview(name: str, budget: int, tile_side: int) -> None:
    model, inputs = model_of(name), build_inputs(name, (("image",),))
    newline = model.base_model.image_newline[None]
    tiles = inputs["pixel_values"][0]
    expected = [features_of_tiles(model, tiles, 4)[0]]
    if tile_side:
        grid = features_of_tiles(model, tiles[1:], tile_side).unflatten(1, (tile_side, tile_side))
        for row in range(tile_side):
            expected += [grid[0, row], grid[1, row], newline]
    else:
        expected.append(newline)
    tokens = torch.cat(expected)
    assert len(tokens) <= budget
    with attach(model, Downsample(), schedule=Schedule(((0, budget),))) as pruner:
        logits = model(**inputs).logits[:, -1]
        assert pruner.trace[0].counts == (len(tokens),)
    torch.testing.assert_close(logits, shortened(model, inputs, [tokens]), atol=ATOL, rtol=1e-4)


@pytest.mark.parametrize(("budget", "side"), [(16, 3), (10, 3), (9, 2), (2, 1), (1, 0)])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_an_overview_shrinks_where_tiles_do_not_fit(name: str, budget: int, side: int) -> None:
    model, inputs = model_of(name), build_inputs(name, (("image",),))
    tokens = torch.zeros(0, 64)
    if side:
        overview = features_of_tiles(model, inputs["pixel_values"][0, :1], side)[0]
        tokens = torch.cat([overview, model.base_model.image_newline[None]])
    with attach(model, Downsample(), schedule=Schedule(((0, budget),))) as pruner:
        logits = model(**inputs).logits[:, -1]
        assert pruner.trace[0].counts == (len(tokens),)
    torch.testing.assert_close(logits, shortened(model, inputs, [tokens]), atol=ATOL, rtol=1e-4)


def test_scores_are_packed_as_features_are_where_packing_interpolates() -> None:
    """16 tiles of LLaVA-OneVision are packed as if they were 9: a slot has the mean of patches, weighted as theirs."""
    torch.manual_seed(0)
    model = TINY["llava_onevision"].build().eval().requires_grad_(False)
    model.config.image_grid_pinpoints = [[128, 128]]
    sharpen(tower_of(model), 3)
    pixels = torch.randn(1, 17, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[128, 128]])}
    read, _ = reading_of(model, inputs)
    big = read.view(17, 4, 4)[1:].view(4, 4, 4, 4).transpose(1, 2).reshape(16, 16)
    small = interpolate(big[None, None], [12, 12], mode="bilinear")[0, 0]
    expected = torch.cat([read[:16], torch.cat([small, -torch.ones(12, 1)], 1).flatten()])
    ids = torch.tensor([[BOS_ID, *[IMAGE_ID] * len(expected), FIRST_WORD]])
    policy = SeenFasterVLM()
    with attach(model, policy, schedule=Schedule(((0, 100),))):
        model(**inputs, input_ids=ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(policy.decision.scores[0] % 2, expected % 2, atol=1e-6, rtol=1e-5)
