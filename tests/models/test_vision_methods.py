"""Methods that look into the vision tower: what they read of it, which tokens they choose, what they make of them."""

from __future__ import annotations

import functools
import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.models.agreement import single_row
from tests.models.tiny_families import (
    FAMILY_NAMES,
    GRIDS,
    IMAGE_ID,
    TINY,
    Rows,
    build_inputs,
    build_model,
    visual_mask,
)
from toprl_models import Policy, Schedule, StageContext, attach
from toprl_models.methods._smaller import from_patches, resized, smaller_grid, spread, to_patches
from toprl_models.methods._tower import TowerReader, TowerReading, split_rows, tile_shares
from toprl_models.methods.downsample import Downsample
from toprl_models.methods.fastervlm import FasterVLM
from toprl_models.methods.visionzip import VisionZip, zip_tiles

CLASS_TOKEN_FAMILIES = ["llava", "llava_next", "video_llava"]
FAMILIES = [name for name in FAMILY_NAMES if TINY[name].min_stage == 0]
POLICIES = [VisionZip, FasterVLM, Downsample]
ONE, MIXED = (("image",),), (("image",), ("image", "image"), (), ("image", "image", "image"))
# float32 rounding of the same sums in another order; the logits are around 2
ATOL = 1e-4


PAIRS = [(policy, family) for policy in POLICIES for family in FAMILIES]


@functools.cache
def model_of(family: str, feature_layer: int = -1) -> Any:
    """A tiny model whose tower's attention and features differ clearly from patch to patch."""
    model = build_model(family)
    if family in CLASS_TOKEN_FAMILIES:
        model.config.vision_feature_layer = feature_layer
    sharpen(tower_of(model))
    return model


def sharpen(tower: Any, factor: float = 8) -> None:
    """Make queries and keys larger."""
    for name, weight in tower.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.mul_(factor)
        elif name.endswith("qkv.weight"):
            weight[: len(weight) * 2 // 3].mul_(factor)


def tower_of(model: Any) -> Any:
    return model.base_model.get_encoder(modality="image")


def schedule(keep: float | int) -> Schedule:
    return Schedule(((0, keep),))


def tiles_of(inputs: dict[str, Tensor]) -> Tensor:
    """The pictures as they enter a CLIP tower, [T, 3, H, W]."""
    pixels = next(inputs[name] for name in ("pixel_values", "pixel_values_images") if name in inputs)
    return pixels.flatten(0, 1) if pixels.ndim == 5 else pixels  # the tiny pinpoints make 3 tiles of each picture


def packed(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """By picture: number of the patch in each visual slot, -1 for newlines."""
    tiles, patches = len(tiles_of(inputs)), 16
    if "image_sizes" not in inputs:
        return list(torch.arange(tiles * patches).view(tiles, patches))
    numbers = torch.arange(tiles * patches).view(-1, 3, patches, 1).float()
    index, _ = model.base_model.pack_image_features(
        list(numbers), inputs["image_sizes"], "default", image_newline=torch.tensor([-1.0])
    )
    return [one[:, 0].long() for one in index]


def tower_outputs(family: str, inputs: dict[str, Tensor], feature_layer: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Attention [T, H, P] of the class token, keys [T, P, H, d], states [T, P + 1, D], from transformers' outputs."""
    tower = tower_of(model_of(family, feature_layer))
    tower.set_attn_implementation("eager")
    try:
        output = tower(tiles_of(inputs), output_attentions=True, output_hidden_states=True, return_dict=True)
    finally:
        tower.set_attn_implementation("sdpa")
    number = range(len(output.hidden_states))[feature_layer]  # output of layer number - 1
    layer = tower.encoder.layers[number - 1]
    keys = layer.self_attn.k_proj(layer.layer_norm1(output.hidden_states[number - 1]))
    keys = keys[:, 1:].unflatten(-1, (layer.self_attn.num_heads, -1))
    return output.attentions[number - 1][:, :, 0, 1:], keys, output.hidden_states[number]


class Probe(Policy):
    """Keeps what was read."""

    def hooks(self, model):
        self.reader = TowerReader(model)
        return self.reader.handles

    def score(self, context: StageContext) -> Tensor:
        self.context, self.reading = context, self.reader.read(self, context)
        return torch.zeros_like(context.valid_mask, dtype=torch.float32)


def probe(model: Any, inputs: dict[str, Tensor]) -> Probe:
    policy = Probe()
    with attach(model, policy, schedule=schedule(0.5)):
        model(**inputs)
    return policy


def short_prompts(model: Any, inputs: dict[str, Tensor], tokens: list[Tensor]) -> dict[str, Tensor]:
    """The prompts with ``tokens`` [n, d] of each picture in place of its own, as embeddings, padded on the left."""
    embed, rows, number = model.get_input_embeddings(), [], 0
    for ids in (row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        parts, start = [], 0
        while start < len(ids):
            if ids[start] != IMAGE_ID:
                parts.append(embed(ids[start : start + 1]))
                start += 1
                continue
            parts.append(tokens[number])
            start += lengths_of(model, inputs)[number]
            number += 1
        rows.append(torch.cat(parts))
    assert number == len(tokens)
    length = max(map(len, rows))
    padded = torch.stack([torch.nn.functional.pad(row, (0, 0, length - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows]).long()
    return {"inputs_embeds": padded, "attention_mask": mask}


def lengths_of(model: Any, inputs: dict[str, Tensor]) -> list[int]:
    """Visual tokens of each picture (of each tile, for InternVL)."""
    if "image_grid_thw" in inputs:
        return [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
    return [len(one) for one in packed(model, inputs)]


def pictures_of_rows(model: Any, inputs: dict[str, Tensor]) -> list[list[int]]:
    lengths, rows, start = lengths_of(model, inputs), [], 0
    for count in visual_mask(inputs).sum(1).tolist():
        rows.append([])
        while count:
            count -= lengths[start]
            rows[-1].append(start)
            start += 1
    return rows


def answers(model: Any, prompts: dict[str, Tensor]) -> Tensor:
    """Greedy tokens."""
    return model.generate(**prompts, max_new_tokens=5, do_sample=False)[:, -5:]


def kept(pruner: Any) -> list[list[int]]:
    return [[number for number in row if number >= 0] for row in pruner.trace[0].indices.tolist()]


# --- reading ---


@pytest.mark.parametrize("feature_layer", [-1, -2, 1])
@pytest.mark.parametrize("family", CLASS_TOKEN_FAMILIES)
def test_what_is_read_is_what_the_tower_computed(family, feature_layer):
    model, inputs = model_of(family, feature_layer), build_inputs(family, MIXED)
    policy = probe(model, inputs)
    reading, valid = policy.reading, policy.context.valid_mask
    attention, keys, states = tower_outputs(family, inputs, feature_layer)
    assert attention.std(-1).min() > 1e-3  # or any order would do
    patches = torch.cat(packed(model, inputs))  # of the slots; -1 for newlines
    is_patch = patches >= 0
    scores = reading.scores[valid]
    torch.testing.assert_close(scores[is_patch], attention.mean(1).flatten()[patches[is_patch]], atol=1e-6, rtol=1e-5)
    assert (scores[~is_patch] == -1).all() and (reading.scores[~valid] == -1).all()
    for read, expected in ((reading.keys, keys.mean(2)), (reading.states, states[:, 1:])):
        torch.testing.assert_close(
            read[valid][is_patch], expected.flatten(0, 1)[patches[is_patch]], atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(reading.class_states, states[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", CLASS_TOKEN_FAMILIES)
def test_slots_are_mapped_to_the_tiles_that_the_model_put_there(family):
    """Features that carry the number of their tile, 1 and up, and newlines of 0, are read off where they were put."""
    model, inputs = build_model(family), build_inputs(family, MIXED)

    def number(module, args, output):
        return torch.arange(1, output.shape[0] + 1.0).view(-1, 1, 1).expand_as(output)

    model.base_model.multi_modal_projector.register_forward_hook(number)
    if family == "llava_next":
        model.base_model.image_newline.zero_()
    policy = probe(model, inputs)
    reading, context = policy.reading, policy.context
    numbers = context.hidden_states[..., 0].long() - 1
    assert torch.equal(reading.tile[context.valid_mask], numbers[context.valid_mask])
    assert (reading.tile[~context.valid_mask] == -1).all()
    if family == "llava_next":
        assert (numbers[context.valid_mask] == -1).sum() == 2 * (4 + 8 + 2)
        assert sorted(set(reading.capacities)) == [8, 16]  # patches that unpadding left
    for tile, (slots, capacity) in enumerate(zip(reading.slots_of_tiles(), reading.capacities, strict=True)):
        assert capacity == len(slots) and (reading.tile.flatten()[slots] == tile).all() and (slots.diff() > 0).all()
    per_image = 3 if family == "llava_next" else 1
    assert [len(tiles) for tiles in reading.tiles] == [per_image * len(row) for row in MIXED]
    assert set(reading.sizes) == {16}


@pytest.mark.parametrize(("policy", "family"), PAIRS)
def test_nothing_stays_behind(policy, family):
    model, inputs = model_of(family), build_inputs(family, MIXED)
    hooks_before = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    chosen = policy()
    with attach(model, chosen, schedule=schedule(0.5)) as pruner:
        recorder = chosen._recorder if policy is Downsample else chosen._reader._recorder
        model(**inputs)
        assert recorder._seen == {}
        model.generate(**inputs, max_new_tokens=2)
        assert recorder._seen == {}
        with pruner.disabled():
            model(**inputs)
        assert recorder._seen == {}
        until_image = cut(inputs, int(visual_mask(inputs).any(0).nonzero().max()) + 1)
        model(**until_image)  # the question does not matter
        assert recorder._seen == {} and sum(pruner.trace[0].counts) < sum(pruner.trace[0].num_visual)
    assert "pack_image_features" not in vars(model.base_model)
    hooks_after = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    # transformers installs hooks of its own at the first call, and leaves them
    with attach(model, policy(), schedule=schedule(0.5)):
        model(**inputs)
    assert hooks_after == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    assert all(after >= before for after, before in zip(hooks_after, hooks_before, strict=True))


def cut(inputs: dict[str, Tensor], end: int) -> dict[str, Tensor]:
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {name: value[:, :end] if name in per_token else value for name, value in inputs.items()}


# --- pure functions ---


def test_tile_shares_are_even_and_exact():
    assert tile_shares(10, [9, 9, 9]) == [3, 3, 4]
    assert tile_shares(10, [5, 1, 9]) == [4, 1, 5]
    assert tile_shares(2, [5, 5, 5]) == [0, 1, 1]
    assert tile_shares(0, [5]) == [0]
    assert tile_shares(7, []) == []
    assert tile_shares(9, [4, 16, 16], [4, 16, 16]) == [1, 4, 4]
    assert tile_shares(30, [4, 2, 16], [4, 16, 16]) == [4, 2, 16]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        capacities = torch.randint(0, 9, (int(torch.randint(1, 7, (), generator=generator)),), generator=generator)
        budget = int(torch.randint(0, 40, (), generator=generator))
        shares = tile_shares(budget, capacities.tolist())
        assert sum(shares) == min(budget, int(capacities.sum()))
        assert all(share <= capacity for share, capacity in zip(shares, capacities.tolist(), strict=True))
        # nobody who could take more has two fewer than another
        below = [share for share, capacity in zip(shares, capacities.tolist(), strict=True) if share < capacity]
        assert not below or max(shares) - min(below) <= 1


def test_split_rows():
    assert split_rows([4, 4, 6], (4, 0, 10)) == (1, [range(0, 1), range(1, 1), range(1, 3)])
    assert split_rows([4, 6], (4, 4, 0, 0, 6, 6)) == (2, [range(0, 1), range(1, 1), range(1, 2)])
    for lengths, counts in (([4], (3,)), ([4], (4, 8)), ([4, 4], (4, 2)), ([], (4,)), ([4, 4], (2, 6)), ([4], (0, 0))):
        with pytest.raises(ValueError, match="the vision tower made"):
            split_rows(lengths, counts)


def test_zip_tiles_by_hand():
    """Six patches of two numbers; dominant are 1 and 4, targets are the others 0 and 3, which 2 and 5 join."""
    states = torch.tensor([[0.0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]])[None]
    attention = torch.tensor([[0.1, 0.9, 0.2, 0.1, 0.8, 0.3]])
    keys = torch.tensor([[1.0, 0], [0, 0], [30, 1], [0, 2], [0, 0], [2, 1]])[None]
    tokens, chosen = zip_tiles(states, keys, attention, num_dominant=2, num_contextual=2)
    assert chosen.tolist() == [[1, 4, 0, 3]]
    # patches 2 and 5 both point to patch 0: (0, 1) + ((4, 5) + (10, 11)) / 2; nobody points to patch 3
    assert tokens.tolist() == [[[2, 3], [8, 9], [7, 9], [6, 7]]]
    # keys of length 0 apart, the length of a key must not matter
    again, _ = zip_tiles(states, keys * torch.tensor([1, 1, 0.01, 50, 1, 7])[:, None], attention, 2, 2)
    assert torch.equal(again, tokens)
    dominant, chosen = zip_tiles(states, keys, attention, 2, 0)
    assert dominant.tolist() == [[[2, 3], [8, 9]]] and chosen.tolist() == [[1, 4]]
    assert zip_tiles(states, keys, attention, 0, 0)[0].tolist() == [[]]
    assert zip_tiles(states, keys, attention, 0, 6)[0].tolist() == states.tolist()  # no rest


def zipped_by_loops(states: Tensor, keys: Tensor, attention: Tensor, dominant: int, contextual: int) -> Tensor:
    """One tile: tokens [dominant + contextual, D], as the authors describe them, without any tensor algebra."""
    order = sorted(range(len(attention)), key=lambda patch: -float(attention[patch]))
    best = sorted(order[:dominant])
    tokens = [states[patch] for patch in best]
    others = [patch for patch in range(len(attention)) if patch not in best]
    targets = others[:: max(1, len(others) // contextual)][:contextual] if contextual else []
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for patch in (patch for patch in others if patch not in targets):
        cosines = {one: torch.cosine_similarity(keys[patch], keys[one], dim=0) for one in targets}
        if cosines:
            joined[max(cosines, key=cosines.__getitem__)].append(patch)
    for target, patches in joined.items():
        merged = sum((states[patch] for patch in patches), torch.zeros_like(states[0]))
        tokens.append(states[target] + merged / max(1, len(patches)))
    return torch.stack(tokens) if tokens else states[:0]


@pytest.mark.parametrize(("patches", "dominant", "contextual"), [(16, 4, 3), (49, 7, 12), (30, 1, 7), (30, 20, 10)])
def test_zip_tiles_against_loops(patches, dominant, contextual):
    generator = torch.Generator().manual_seed(patches + contextual)
    states, keys = torch.randn(2, patches, 5, generator=generator), torch.randn(2, patches, 4, generator=generator)
    attention = torch.rand(2, patches, generator=generator)
    tokens, _ = zip_tiles(states, keys, attention, dominant, contextual)
    expected = [zipped_by_loops(*tile, dominant, contextual) for tile in zip(states, keys, attention, strict=True)]
    torch.testing.assert_close(tokens, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_visionzip_splits_budgets_as_its_authors():
    policy = VisionZip()
    assert [policy.split(total) for total in (192, 128, 64, 32)] == [(162, 30), (108, 20), (54, 10), (27, 5)]
    assert [policy.split(total) for total in (1, 2, 4)] == [(1, 0), (2, 0), (3, 1)]
    assert VisionZip(0.0).split(64) == (64, 0) and VisionZip(0.99).split(1) == (1, 0)
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"contextual_ratio=.* must be in \[0, 1\)"):
            VisionZip(wrong)


def test_smaller_grids():
    for side in (4, 16, 24):
        for budget in range(side * side + 1):
            assert smaller_grid(side, side, budget) == (math.isqrt(budget),) * 2
    assert smaller_grid(10, 40, 3) == (1, 3)
    assert smaller_grid(40, 10, 3) == (3, 1)
    for height, width in ((20, 30), (7, 50), (33, 8)):
        for budget in range(1, height * width + 1, 7):
            rows, columns = smaller_grid(height, width, budget)
            assert 1 <= rows * columns <= budget and rows <= height and columns <= width
            # in the shape of the picture, to a token
            short, long = sorted((height, width))
            exact = max(rows, columns) * short / long
            assert abs(min(rows, columns) - exact) < 1
    assert smaller_grid(20, 30, 600) == (20, 30)


def test_new_tokens_are_spread_over_the_grid():
    assert spread((4, 4), (2, 2)).tolist() == [5, 7, 13, 15]
    assert spread((3, 5), (1, 3)).tolist() == [5, 7, 9]
    assert spread((4, 6), (4, 6)).tolist() == list(range(24))
    slots = spread((24, 24), (13, 13))
    assert len(slots) == 169 and (slots.diff() > 0).all() and slots.max() < 576


@pytest.mark.parametrize("size", [(24, 16), (40, 24), (8, 8)])
def test_resizing_is_that_of_an_image_library(size):
    picture = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    expected = resized_by_pillow(picture, *size)
    torch.testing.assert_close(resized(picture, *size), expected, atol=1e-5, rtol=1e-5)
    assert resized(picture.bfloat16(), *size).dtype == torch.bfloat16


def resized_by_pillow(pictures: Tensor, height: int, width: int) -> Tensor:
    channels = [Image.fromarray(channel.numpy()) for channel in pictures.flatten(0, 1)]
    small = [torch.tensor(np.array(one.resize((width, height), Image.Resampling.BICUBIC))) for one in channels]
    return torch.stack(small).unflatten(0, pictures.shape[:2])


def cut_into_patches(picture: Tensor, side: int = 4) -> Tensor:
    """As Qwen's processor does: 2 x 2 patches after 2 x 2 patches, a still picture twice in time."""
    patches = []
    for top in range(0, picture.shape[1], 2 * side):
        for left in range(0, picture.shape[2], 2 * side):
            for y, x in ((0, 0), (0, side), (side, 0), (side, side)):
                patch = picture[:, top + y : top + y + side, left + x : left + x + side]
                patches.append(torch.stack([patch, patch], 1).flatten())
    return torch.stack(patches)


def test_patches_become_a_picture_and_patches_again():
    picture = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0))
    patches = cut_into_patches(picture)
    again = from_patches(patches, (1, 4, 6), 2, 2, 4)
    assert torch.equal(again, picture.expand(2, -1, -1, -1))
    assert torch.equal(to_patches(again, 2, 2, 4), patches)


# --- the methods in the model ---


def expected_zip(family: str, inputs: dict[str, Tensor], keep: float) -> list[Tensor]:
    """New tokens [n, d] of each picture, tile by tile."""
    model, policy = model_of(family), VisionZip()
    attention, keys, states = tower_outputs(family, inputs)
    present = packed(model, inputs)
    tokens: dict[int, list[Tensor]] = {number: [] for number in range(len(present))}
    for shares, tiles in shares_of_rows(model, inputs, keep):
        for share, tile in zip(shares, tiles, strict=True):
            patches = [patch for patch in range(16) if torch.cat(present).eq(tile * 16 + patch).any()]
            if share:
                dominant, contextual = policy.split(share)
                zipped = zipped_by_loops(
                    states[tile][1:][patches],
                    keys[tile].mean(1)[patches],
                    attention[tile].sum(0)[patches],
                    dominant - 1,
                    contextual,
                )
                tokens[tile * len(present) // len(states)].append(torch.cat([states[tile][:1], zipped]))
    projector = model.base_model.multi_modal_projector
    return [projector(torch.cat(tokens[number])) for number in tokens]


def shares_of_rows(model: Any, inputs: dict[str, Tensor], keep: float) -> list[tuple[list[int], list[int]]]:
    """Tokens of each tile, and the tiles, by row."""
    present = packed(model, inputs)
    per_image = len(tiles_of(inputs)) // len(present)
    rows = []
    for pictures in pictures_of_rows(model, inputs):
        tiles = [picture * per_image + tile for picture in pictures for tile in range(per_image)]
        capacities = [int((torch.cat(present) // 16 == tile).sum()) for tile in tiles]
        (budget,) = schedule(keep).counts(sum(len(present[picture]) for picture in pictures))
        rows.append((tile_shares(budget, capacities), tiles))
    return rows


@pytest.mark.parametrize("keep", [0.2, 0.6])
@pytest.mark.parametrize("rows", [ONE, MIXED], ids=["one", "padded"])
@pytest.mark.parametrize("family", CLASS_TOKEN_FAMILIES)
def test_visionzip_is_the_model_on_the_authors_tokens(family, rows, keep):
    model, inputs = model_of(family), build_inputs(family, rows)
    short = short_prompts(model, inputs, expected_zip(family, inputs, keep))
    expected = model(**short).logits[:, -1]
    with attach(model, VisionZip(), schedule=schedule(keep)) as pruner:
        torch.testing.assert_close(model(**inputs).logits[:, -1], expected, atol=ATOL, rtol=1e-4)
        assert pruner.trace[0].counts == tuple(schedule(keep).counts(n)[0] for n in visual_mask(inputs).sum(1).tolist())
        tokens = answers(model, inputs)
    plain = model(**inputs).logits[:, -1]
    assert torch.equal(tokens, answers(model, short))
    with_images = visual_mask(inputs).any(1)
    assert ((model(**short).logits[:, -1] - plain)[with_images].abs().amax(-1) > 0.1).all()


def test_visionzip_keeps_the_slots_of_dominant_patches_and_targets():
    model, inputs = model_of("llava"), build_inputs("llava", ONE)
    attention = tower_outputs("llava", inputs)[0].mean(1)[0]
    with attach(model, VisionZip(0.25), schedule=schedule(8)) as pruner:
        model(**inputs)
    dominant = set(attention.topk(5).indices.tolist())
    others = [patch for patch in range(16) if patch not in dominant]
    targets = {others[0], others[5]}
    first = min(set(others) - targets)
    assert set(kept(pruner)[0]) == dominant | targets | {first}
    scores = pruner.trace[0].scores[0]
    torch.testing.assert_close(scores % 2, attention, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keep", [0.2, 0.6])
@pytest.mark.parametrize("rows", [ONE, MIXED], ids=["one", "padded"])
@pytest.mark.parametrize("family", CLASS_TOKEN_FAMILIES)
def test_fastervlm_keeps_the_best_patches_of_each_tile(family, rows, keep):
    model, inputs = model_of(family), build_inputs(family, rows)
    attention = tower_outputs(family, inputs)[0].mean(1)
    present, features = packed(model, inputs), projected(model, inputs)
    wanted: set[int] = set()
    for shares, tiles in shares_of_rows(model, inputs, keep):
        for share, tile in zip(shares, tiles, strict=True):
            patches = torch.cat(present)[torch.cat(present) // 16 == tile] % 16
            best = sorted(patches.tolist(), key=lambda patch: -float(attention[tile, patch]))[:share]
            wanted |= {tile * 16 + patch for patch in best}
    chosen = [torch.tensor([number in wanted for number in one.tolist()]) for one in present]
    short = short_prompts(model, inputs, [one[mask] for one, mask in zip(features, chosen, strict=True)])
    expected = model(**short).logits[:, -1]
    with attach(model, FasterVLM(), schedule=schedule(keep)) as pruner:
        torch.testing.assert_close(model(**inputs).logits[:, -1], expected, atol=ATOL, rtol=1e-4)
        expected = [
            torch.cat([chosen[picture] for picture in pictures]).nonzero()[:, 0].tolist() if pictures else []
            for pictures in pictures_of_rows(model, inputs)
        ]
        assert kept(pruner) == expected
        assert torch.equal(answers(model, inputs), answers(model, short))


def projected(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The model's own features of each picture."""
    names = ("pixel_values", "pixel_values_images", "image_sizes")
    features = model.base_model.get_image_features(
        *(inputs[name] for name in names if name in inputs), return_dict=True
    )
    return list(features.pooler_output)


def test_newlines_stay_only_where_all_patches_do():
    model, inputs = model_of("llava_next"), build_inputs("llava_next", ONE)
    (slots,) = packed(model, inputs)
    newlines = (slots < 0).nonzero()[:, 0].tolist()
    for policy in (FasterVLM(), VisionZip()):
        for extra in (0, 2):
            with attach(model, policy, schedule=schedule(int((slots >= 0).sum()) + extra)) as pruner:
                model(**inputs)
            assert [number for number in kept(pruner)[0] if number in newlines] == newlines[:extra]


def small_features(model: Any, pixels: Tensor, side: int, unit: int) -> Tensor:
    """Features [T, n, d] of the pictures at ``side`` x ``side`` tokens of ``unit`` pixels."""
    small = resized(pixels, side * unit, side * unit)
    options = {"interpolate_pos_encoding": True} if unit == 8 and hasattr(tower_of(model), "pre_layrnorm") else {}
    features = model.base_model.get_image_features(small, return_dict=True, **options).pooler_output
    return torch.stack(list(features))


@pytest.mark.parametrize(("keep", "side"), [(0.6, 3), (0.3, 2), (0.1, 1)])
@pytest.mark.parametrize("rows", [ONE, MIXED], ids=["one", "padded"])
@pytest.mark.parametrize("family", ["llava", "video_llava", "internvl"])
def test_downsample_is_the_model_on_smaller_pictures(family, rows, keep, side):
    model, inputs = model_of(family), build_inputs(family, rows)
    features = small_features(model, tiles_of(inputs), side, unit=8)
    assert features.shape[1] == side * side
    short = short_prompts(model, inputs, list(features))
    policy = Downsample()
    expected = model(**short).logits[:, -1]
    with attach(model, policy, schedule=schedule(keep)) as pruner:
        torch.testing.assert_close(model(**inputs).logits[:, -1], expected, atol=ATOL, rtol=1e-4)
        visual = visual_mask(inputs).sum(1).tolist()
        assert pruner.trace[0].counts == tuple(side * side * count // 16 for count in visual)
        assert pruner.trace[0].counts == tuple(policy.counts(schedule(keep), count)[0] for count in visual)
        for row, count in zip(kept(pruner), visual, strict=True):
            spots = spread((4, 4), (side, side)).tolist()
            assert row == [16 * tile + spot for tile in range(count // 16) for spot in spots]
        assert torch.equal(answers(model, inputs), answers(model, short))


@pytest.mark.parametrize("rows", [ONE, (("image",), ("image", "image"))], ids=["one", "padded"])
def test_downsample_is_qwen_on_smaller_pictures_at_their_places(rows):
    """Half the tokens of 4 x 4, 2 x 6 and 4 x 6: 2 x 2, 1 x 5 and 3 x 4, in the positions of their slots."""
    family = "qwen2_5_vl"
    model, inputs = model_of(family), build_inputs(family, rows)
    generator = torch.Generator().manual_seed(1)
    grids = GRIDS[: sum(map(len, rows))]
    pictures = [torch.randn(3, 4 * height, 4 * width, generator=generator) for _, height, width in grids]
    inputs["pixel_values"] = torch.cat([cut_into_patches(picture) for picture in pictures])
    small = [(2, 2), (1, 5), (3, 4)][: len(grids)]
    patches = [
        cut_into_patches(resized(picture[None], 8 * height, 8 * width)[0])
        for picture, (height, width) in zip(pictures, small, strict=True)
    ]
    grid = torch.tensor([(1, 2 * height, 2 * width) for height, width in small])
    features = model.base_model.get_image_features(torch.cat(patches), grid, return_dict=True).pooler_output
    short = short_prompts(model, inputs, list(features))
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    positions, _ = model.base_model.get_rope_index(**{name: inputs[name] for name in names})
    alive = inputs["attention_mask"].bool()
    slots = iter(
        spread((height // 2, width // 2), one).tolist() for (_, height, width), one in zip(grids, small, strict=True)
    )
    dropped = torch.zeros_like(alive)
    for row, ids in enumerate(inputs["input_ids"]):
        starts = (ids == 92).nonzero()[:, 0] + 1  # behind <|vision_start|>
        for start in starts.tolist():
            length = int((ids[start:] == 93).nonzero()[0])
            dropped[row, start : start + length] = True
            dropped[row, start + torch.tensor(next(slots))] = False
    short_positions = torch.zeros(3, *short["attention_mask"].shape, dtype=torch.long)
    for row in range(len(alive)):
        short_positions[:, row, short["attention_mask"][row].bool()] = positions[:, row, alive[row] & ~dropped[row]]
    expected = model(**short, position_ids=short_positions).logits[:, -1]
    with attach(model, Downsample(), schedule=schedule(0.5)) as pruner:
        torch.testing.assert_close(model(**inputs).logits[:, -1], expected, atol=ATOL, rtol=1e-4)
    assert sum(pruner.trace[0].counts) == sum(height * width for height, width in small)


def test_downsample_counts_before_it_is_attached():
    assert Downsample().counts(schedule(192), 576) == (169,)
    assert Downsample().counts(schedule(576), 576) == (576,)
    assert Downsample().counts(schedule(0), 576) == (0,)


def test_pictures_without_a_token_vanish():
    model, inputs = model_of("llava"), build_inputs("llava", (("image", "image", "image"),))
    with attach(model, Downsample(), schedule=schedule(2)) as pruner:
        model(**inputs)
    assert pruner.trace[0].counts == (0,)


def test_pictures_of_a_row_that_keeps_all_are_not_encoded_again():
    model, inputs, seen = model_of("llava"), build_inputs("llava", MIXED), []
    handle = tower_of(model).register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    with attach(model, Downsample(), schedule=schedule(16)):  # the first row has 16 tokens
        model(**inputs)
    handle.remove()
    assert seen == [(6, 3, 32, 32), (5, 3, 16, 16)]


# --- what holds for all of them ---


@pytest.mark.parametrize("keep", [24, 0.5])
@pytest.mark.parametrize(("policy", "family"), PAIRS)
def test_a_batch_is_its_rows(policy, family, keep):
    """With 24 tokens to keep, some rows of some families keep all theirs."""
    rows: Rows = MIXED
    model, inputs = model_of(family), build_inputs(family, rows)
    with attach(model, policy(), schedule=schedule(keep)) as pruner:
        batch, trace = model(**inputs).logits[:, -1], pruner.trace[0]
        for number, row in enumerate(rows):
            alone = model(**single_row(family, inputs, rows, number)).logits[0, -1]
            torch.testing.assert_close(batch[number], alone, atol=ATOL, rtol=1e-4)
            if row:
                assert pruner.trace[0].counts == trace.counts[number : number + 1]


@pytest.mark.parametrize(("policy", "family"), PAIRS)
def test_keep_all_changes_nothing(policy, family):
    model, inputs = model_of(family), build_inputs(family, MIXED)
    plain = model(**inputs).logits
    with attach(model, policy(), schedule=schedule(1.0)):
        assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param((("image",), ()), id="single"),
        # older releases repeat the pictures one by one, which mixes up those of a row
        pytest.param(MIXED, id="several", marks=pytest.mark.since("5.19")),
    ],
)
@pytest.mark.parametrize(("policy", "family"), PAIRS)
def test_decisions_repeat_and_rows_may_be_repeated(policy, family, rows):
    """``num_return_sequences`` and beams repeat rows but, where they are encoded before, not pictures."""
    model, inputs = model_of(family), build_inputs(family, rows)
    with attach(model, policy(), schedule=schedule(0.5)) as pruner:
        first = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, first)
        one = answers(model, inputs)
        indices = pruner.trace[0].indices
        beams = model.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=2, num_return_sequences=2)
        assert torch.equal(pruner.trace[0].indices, indices.repeat_interleave(2, 0))
        torch.manual_seed(0)
        drawn = model.generate(**inputs, max_new_tokens=5, do_sample=True, top_k=1, num_return_sequences=2)[:, -5:]
    assert len(beams) == 2 * len(one)
    assert torch.equal(drawn, one.repeat_interleave(2, 0))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_all_towers_fit(policy, family):
    policy().check(model_of(family), schedule(0.5))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("stages", [((1, 0.5),), ((0, 0.5), (2, 0.2))])
def test_other_stages_are_refused(policy, stages):
    with pytest.raises(ValueError, match="use one stage at layer 0"):
        attach(model_of("llava"), policy(), schedule=Schedule(stages))


@pytest.mark.parametrize("policy", POLICIES)
def test_videos_are_refused(policy):
    model, inputs = model_of("video_llava"), build_inputs("video_llava", (("image", "video"),))
    with attach(model, policy(), schedule=schedule(0.5)):
        for call in (model, functools.partial(model.generate, max_new_tokens=2)):
            with pytest.raises(ValueError, match="is defined for images, not for videos"):
                call(**inputs)


@pytest.mark.parametrize("policy", [VisionZip, FasterVLM])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": [-1, -2]}, "must be one of the vision tower's 2 layers"),
        ({"vision_feature_layer": -3}, "must be one of the vision tower's 2 layers"),
        ({"vision_feature_layer": 0}, "must be one of the vision tower's 2 layers"),
        ({"vision_feature_layer": 3}, "must be one of the vision tower's 2 layers"),
        ({"vision_feature_select_strategy": "full"}, 'must be "default"'),
    ],
)
def test_configs_that_do_not_fit_are_refused(policy, change, message):
    model = build_model("llava")
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        policy().check(model, schedule(0.5))
    if "full" in change.values():
        with pytest.raises(ValueError, match='must be "default"'):
            Downsample().check(model, schedule(0.5))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_model_without_a_tower_is_refused(policy, monkeypatch):
    model = build_model("llava")
    monkeypatch.setattr(type(model.base_model), "get_encoder", lambda self, modality: self)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration has no vision tower"):
        policy().check(model, schedule(0.5))


@pytest.mark.parametrize("policy", POLICIES)
def test_two_projectors_are_refused(policy):
    model = build_model("llava")
    model.base_model.second = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="which of multi_modal_projector, second of"):
        policy().check(model, schedule(0.5))


def test_an_unreadable_attention_is_refused():
    model = build_model("llava")
    for layer in tower_of(model).encoder.layers:
        layer.self_attn = torch.nn.MultiheadAttention(8, 2)
    for policy in (VisionZip, FasterVLM):
        with pytest.raises(ValueError, match=r"CLIPVisionModel\) has no layers with one attention"):
            policy().check(model, schedule(0.5))


def test_position_embeddings_that_cannot_be_interpolated_are_refused(monkeypatch):
    model = build_model("llava")
    monkeypatch.delattr(type(tower_of(model).embeddings), "interpolate_pos_encoding")
    with pytest.raises(ValueError, match="cannot interpolate its position embeddings"):
        Downsample().check(model, schedule(0.5))


@pytest.mark.parametrize("policy", [VisionZip, FasterVLM])
def test_another_layer_in_the_call_is_refused(policy):
    model, inputs = model_of("llava"), build_inputs("llava", ONE)
    with attach(model, policy(), schedule=schedule(0.5)), pytest.raises(ValueError, match="set it there"):
        model(**inputs, vision_feature_layer=-2)


@pytest.mark.parametrize("policy", POLICIES)
def test_placeholders_under_padding_are_refused(policy):
    model, inputs = model_of("llava"), build_inputs("llava", ONE)
    inputs["attention_mask"][0, :6] = 0
    with attach(model, policy(), schedule=schedule(0.5)), pytest.raises(ValueError, match="no placeholders under"):
        model(**inputs)


@pytest.mark.since("5.23")
@pytest.mark.parametrize("policy", POLICIES)
def test_features_made_ahead_of_time_are_refused(policy):
    """The tower ran for other pictures since, or was not watched."""
    model, inputs = model_of("llava"), build_inputs("llava", ONE)
    pixels = inputs.pop("pixel_values")
    features = model.base_model.get_image_features(pixels, return_dict=True)
    with attach(model, policy(), schedule=schedule(0.5)):
        with pytest.raises(ValueError, match="the vision tower did not run"):
            model(**inputs, mm_encoder_outputs={"image": features})
        model.base_model.get_image_features(pixels.flip(-1), return_dict=True)
        with pytest.raises(ValueError, match="not what the vision tower made last"):
            model(**inputs, mm_encoder_outputs={"image": features})
        watched = model.base_model.get_image_features(pixels, return_dict=True)
        again = model(**inputs, mm_encoder_outputs={"image": watched}).logits
        assert torch.equal(again, model(**inputs, pixel_values=pixels).logits)


@pytest.mark.since("5.23")
@pytest.mark.parametrize(("policy", "family"), PAIRS)
def test_prefill_in_chunks_needs_all_pictures_in_the_first(policy, family):
    model, inputs = model_of(family), build_inputs(family, (("image", "image"),))
    end = int(visual_mask(inputs).nonzero()[-1, 1]) + 1
    with attach(model, policy(), schedule=schedule(0.5)):
        chunked = model.generate(**inputs, max_new_tokens=5, do_sample=False, prefill_chunk_size=end + 2)
        assert torch.equal(chunked[:, -5:], answers(model, inputs))
        first = int(visual_mask(inputs).nonzero()[0, 1])
        first_picture = first + int((~visual_mask(inputs)[0, first:]).nonzero()[0])
        with pytest.raises(ValueError, match="prefill_chunk_size=None"):
            model.generate(**inputs, max_new_tokens=5, prefill_chunk_size=first_picture + 2)


@pytest.mark.parametrize(("policy", "family"), PAIRS)
def test_half_precision(policy, family):
    """The same tokens as of the same weights in float32 (but for ties), and answers near theirs."""
    model = build_model(family).bfloat16()
    inputs = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in build_inputs(family, MIXED).items()
    }
    with attach(model, policy(), schedule=schedule(0.5)) as pruner:
        logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16 and logits[:, -1].isfinite().all()
    single = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    with attach(model.float(), policy(), schedule=schedule(0.5)) as exact:
        model(**single)
    assert pruner.trace[0].counts == exact.trace[0].counts
    torch.testing.assert_close(pruner.trace[0].scores % 2, exact.trace[0].scores % 2, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("policy", "family"), PAIRS)
def test_a_detached_policy_lets_go_of_the_model(policy, family):
    model, chosen = build_model(family), policy()
    with attach(model, chosen, schedule=schedule(0.5)):
        model(**build_inputs(family, ONE))
    tower = weakref.ref(tower_of(model))
    del model
    gc.collect()
    assert tower() is None


def test_a_reading_is_plain_data():
    reading = probe(model_of("llava"), build_inputs("llava", ONE)).reading
    assert isinstance(reading, TowerReading)
    assert reading.shares((5,)) == [5] and reading.repeats == 1
