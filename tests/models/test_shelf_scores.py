"""Scores of further methods, again in plain code from the unattached model's states and attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.tiny_families import build_inputs, build_model, visual_mask
from toprl_models import Decision, Policy, Schedule, StageContext, attach
from toprl_models.methods import (
    DART,
    CDPruner,
    FitPrune,
    GPrune,
    HiPrune,
    HoloV,
    PruMergePlus,
    ToMe,
    VisPruner,
    VScan,
)
from toprl_models.methods._tiles import Tile
from toprl_models.methods.cdpruner import LEAST
from toprl_models.methods.prumerge_plus import NEIGHBOURS
from toprl_models.methods.pyramiddrop import PyramidDrop
from toprl_models.probe import decoder_of

ROWS = (("image",), ("image", "image"), ())
PATCHES = 16  # of an image of the tiny LLaVA, 4 x 4


class Recorded(Policy):
    """A policy that passes on what another decides, and remembers it."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.attention_from, self.positions = policy, policy.attention_from, policy.positions
        self.hooks, self.check = policy.hooks, policy.check

    def decide(self, context: StageContext) -> Decision:
        self.context, self.decision = context, self.policy.decide(context)
        return self.decision


def sharp_model(backend: str = "eager") -> Any:
    """The tiny LLaVA with attention that differs clearly from patch to patch."""
    model = build_model("llava", backend)
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")) and "vision" in name:
            weight.mul_(8)
    return model


def decided(model: Any, policy: Policy, keep: int, layer: int = 0) -> tuple[Recorded, Any, dict[str, Tensor]]:
    """A pass of ROWS behind a policy: its context and decision, the detached pruner and the inputs."""
    inputs, recorded = build_inputs("llava", ROWS), Recorded(policy)
    with attach(model, recorded, schedule=Schedule(((layer, keep),))) as pruner:
        model(**inputs)
    return recorded, pruner, inputs


def kept(pruner: Any) -> list[list[int]]:
    return [[number for number in row if number >= 0] for row in pruner.trace[0].indices.tolist()]


def embeddings_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What enters layer 0, ``[B, N, d]``."""
    seen = []
    hook = decoder_of(model).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    return seen[0]


def tower_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Of each picture, in float64: attentions [L, H, 17, 17], states [17, d] that the projector gets, keys [L, 17, d].

    ``queries`` and ``keys`` have all heads side by side.
    """
    tower = model.base_model.get_encoder(modality="image")
    tower.set_attn_implementation("eager")
    output = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    found: dict[str, Any] = {"attention": torch.stack(output.attentions, 1), "states": output.hidden_states[-1]}
    for name in ("queries", "keys"):
        parts = []
        for layer, states in zip(tower.encoder.layers, output.hidden_states, strict=False):
            project = layer.self_attn.q_proj if name == "queries" else layer.self_attn.k_proj
            parts.append(project(layer.layer_norm1(states)))
        found[name] = torch.stack(parts, 1)
    return {name: value.double().numpy() for name, value in found.items()}


def cosines(points: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    others = points if others is None else others
    norms = np.linalg.norm(points, axis=-1)[:, None] * np.linalg.norm(others, axis=-1)
    return points @ others.T / norms


def best(values: np.ndarray, count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda one: -values[one])[:count]


def assert_kept(pruner: Any, expected: list[list[int]]) -> None:
    """``expected`` numbers the patches of each picture; the second row has two pictures."""
    first, second, third = map(sorted, expected)
    assert kept(pruner) == [first, [*second, *(PATCHES + one for one in third)], []]


# --- before the language model, by states alone ---


def test_cdpruner_raises_the_determinant_most() -> None:
    model = sharp_model()
    recorded, pruner, inputs = decided(model, CDPruner(), 6)
    embeddings = embeddings_of(model, inputs).double().numpy()
    for row, visual in enumerate(visual_mask(inputs).numpy()):
        if not visual.any():
            continue
        states, text = embeddings[row, visual], embeddings[row, visual.nonzero()[0][-1] + 1 :]
        relevance = cosines(states, text).mean(1)
        relevance = (relevance - relevance.min() + LEAST) / (relevance.max() - relevance.min())
        kernel = relevance[:, None] * cosines(states) * relevance
        picks: list[int] = []
        for _ in range(6):
            values = {
                one: np.linalg.slogdet(kernel[np.ix_([*picks, one], [*picks, one])])[1]
                for one in range(len(states))
                if one not in picks
            }
            picks.append(max(values, key=values.__getitem__))
        order = recorded.decision.scores[row].neg()
        assert [int((order == place).nonzero()) for place in range(6)] == picks
        assert kept(pruner)[row] == sorted(picks)


@pytest.mark.parametrize("similarity", [0.5, 0.0])
def test_gprune_passes_norms_along_the_graph(similarity: float) -> None:
    model = sharp_model()
    recorded, _, inputs = decided(model, GPrune(similarity, temperature=0.3, steps=3), 5)
    embeddings, degrees = embeddings_of(model, inputs).double().numpy(), set()
    for row, visual in enumerate(visual_mask(inputs).numpy()):
        states = embeddings[row, visual]
        if not len(states):
            continue
        cosine = cosines(states)
        edges = np.where(cosine >= similarity, np.exp(cosine / 0.3), 0)
        degree = (edges > 0).sum(1)
        degrees |= set(degree.tolist())
        parts = edges / edges.sum(1, keepdims=True)
        expected = np.linalg.norm(states, axis=1) @ np.linalg.matrix_power(parts, 3) / degree
        found = recorded.decision.scores[row, : len(states)].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert len(degrees) > 1 or similarity  # or the graph would say nothing


def merged_by_hand(tokens: list[np.ndarray], keep: int) -> tuple[list[np.ndarray], list[list[int]]]:
    """Groups of tokens: each is the plain mean of its members."""
    groups, states = [[one] for one in range(len(tokens))], list(tokens)
    while len(groups) > keep:
        pairs = []
        for a in range(0, len(groups), 2):
            near = {
                b: float(states[a] @ states[b] / np.linalg.norm(states[a]) / np.linalg.norm(states[b]))
                for b in range(1, len(groups), 2)
            }
            b = max(near, key=near.__getitem__)
            pairs.append((near[b], a, b))
        pairs.sort(reverse=True)
        gone = set()
        for _, a, b in pairs[: min(len(groups) - keep, len(groups) // 2)]:
            groups[b] = groups[b] + groups[a]
            gone.add(a)
        groups = [group for number, group in enumerate(groups) if number not in gone]
        states = [np.mean([tokens[one] for one in group], axis=0) for group in groups]
    return states, groups


@pytest.mark.parametrize("keep", [12, 5, 1, 0])
def test_tome_merges_pairs(keep: int) -> None:
    model = sharp_model()
    recorded, pruner, inputs = decided(model, ToMe(), keep)
    embeddings = embeddings_of(model, inputs).double().numpy()
    for row, visual in enumerate(visual_mask(inputs).numpy()):
        if not visual.any() or not keep:
            assert not kept(pruner)[row]
            continue
        states, groups = merged_by_hand(list(embeddings[row, visual]), keep)
        hosts = [group[0] for group in groups]
        assert kept(pruner)[row] == hosts == sorted(hosts)
        assert recorded.decision.scores[row, hosts].tolist() == [len(group) for group in groups]
        np.testing.assert_allclose(recorded.decision.states[row, hosts].numpy(), np.stack(states), atol=1e-5)


# --- by the vision tower ---


def by_attention_and_difference(attention: np.ndarray, states: np.ndarray, keep: int, ratio: float) -> list[int]:
    """VisPruner's choice."""
    cosine, order = cosines(states), best(attention, len(attention))
    important, rest = order[: int(keep * ratio)], order[int(keep * ratio) :]
    while len(rest) > keep - len(important):
        likeness = {one: max(cosine[one, other] for other in rest[1::2]) for one in rest[::2]}
        ranked = sorted(rest[::2], key=lambda one: -likeness[one])
        removed = ranked[: min(8, len(rest) - keep + len(important), len(ranked))]
        rest = ranked[len(removed) :] + rest[1::2]
    return sorted(important + rest)


@pytest.mark.parametrize(("keep", "ratio"), [(6, 0.5), (3, 0.0), (9, 0.3)])
def test_vispruner_removes_duplicates(keep: int, ratio: float) -> None:
    model, inputs = sharp_model(), build_inputs("llava", (("image",),))
    with attach(model, VisPruner(ratio), schedule=Schedule(((0, keep),))) as pruner:
        model(**inputs)
    tower = tower_of(model, inputs)
    attention = tower["attention"][0, -1, :, 0, 1:].mean(0)
    assert kept(pruner) == [by_attention_and_difference(attention, tower["states"][0, 1:], keep, ratio)]
    for seed in range(5):  # of more patches, in several rounds
        generator = torch.Generator().manual_seed(seed)
        attention, states = torch.rand(60, generator=generator), torch.randn(60, 6, generator=generator)
        tile = Tile(attention, states, states, states, torch.arange(60), (1, 60))
        chosen = VisPruner(ratio).choose(tile, 4 * keep).sort().values.tolist()
        assert chosen == by_attention_and_difference(attention.numpy(), states.double().numpy(), 4 * keep, ratio)


def merit_by_hand(states: np.ndarray, attention: np.ndarray, alpha: float) -> float:
    """HoloV's mean score of the tokens of a crop."""
    others, variances = len(states) - 1, []
    for one in range(len(states)):
        row = [0 if one == other else cosines(states[[one]], states[[other]])[0, 0] for other in range(len(states))]
        mean = sum(row) / others
        variances.append(sum((value - mean) ** 2 for value in row) / others)
    scaled = attention * 1e3
    ratio = np.mean(np.abs(scaled)) / (np.mean(np.abs(variances)) + 1e-6)
    return float(np.mean(scaled + alpha * np.array(variances) * ratio))


def test_holov_shares_among_crops() -> None:
    model = sharp_model()
    assert HoloV.shares(torch.tensor([8.0, 1.0, 1.0]), [3, 2, 9], 10) == [3, 2, 5]
    inputs = build_inputs("llava", (("image",),))
    with attach(model, HoloV(crops=5), schedule=Schedule(((0, 7),))) as pruner:
        model(**inputs)
    attention = tower_of(model, inputs)["attention"][0, -1, :, 0, 1:].mean(0)
    states = embeddings_of(model, inputs)[0, visual_mask(inputs)[0]].double().numpy()
    crops = [list(range(0, 4)), [4, 5, 6], [7, 8, 9], [10, 11, 12], [13, 14, 15]]
    merits = [merit_by_hand(states[crop], attention[crop], 0.09) for crop in crops]
    for crop, merit in zip(crops, merits, strict=True):  # with more weight on variances
        policy, found = HoloV(alpha=5), [torch.tensor(states[crop]), torch.tensor(attention[crop])]
        assert float(policy.merit(*found)) == pytest.approx(merit_by_hand(states[crop], attention[crop], 5), rel=1e-5)
        assert merit_by_hand(states[crop], attention[crop], 5) > 2 * merit
    weights = np.array(merits) / (sum(merits) + 1e-6)
    shares = [min(int(weight * 7), len(crop)) for weight, crop in zip(weights, crops, strict=True)]
    rounds = [crop for size in range(PATCHES) for crop in best(weights, 5) if shares[crop] + size < len(crops[crop])]
    for crop in rounds[: 7 - sum(shares)]:
        shares[crop] += 1
    assert len(set(shares)) > 1
    expected = [crop[one] for crop, share in zip(crops, shares, strict=True) for one in best(attention[crop], share)]
    assert kept(pruner) == [sorted(expected)]


def test_hiprune_keeps_anchors_with_neighbours() -> None:
    model = sharp_model()
    _, pruner, inputs = decided(model, HiPrune(alpha=0.9, depth=0.5), 6)
    attention = tower_of(model, inputs)["attention"]  # of two layers
    received = attention.mean(2).mean(2)[:, :, 1:]  # [picture, layer, patch]
    expected = []
    for (middle, deep), keep in zip(received, (6, 3, 3), strict=True):
        first: list[int] = []
        for anchor in best(middle, round(keep * 0.9 / 5)):
            around = {min(max(anchor + step, 0), PATCHES - 1) for step in (0, -1, 1, -4, 4)}
            first += sorted(around - set(first))
        first = sorted(first)[:keep]
        rest = [one for one in best(deep, PATCHES) if one not in first]
        expected.append(first + rest[: keep - len(first)])
    assert_kept(pruner, expected)
    assert not np.allclose(received[:, 0], received[:, 1], atol=1e-3)


def test_prumerge_plus_merges_neighbours() -> None:
    model, keep = sharp_model(), 6
    inputs = build_inputs("llava", (("image",),))
    recorded = Recorded(PruMergePlus())
    with attach(model, recorded, schedule=Schedule(((0, keep),))) as pruner:
        model(**inputs)
    tower = tower_of(model, inputs)
    query, keys, states = tower["queries"][0, -1, 0], tower["keys"][0, -1], tower["states"][0, 1:]
    weights = np.exp(keys @ query / len(query) ** 0.5)
    attention, cosine = (weights / weights.sum())[1:], cosines(keys[1:])
    by_attention = best(attention, 3)
    others = [one for one in range(PATCHES) if one not in by_attention]
    chosen = [*by_attention, others[3], others[9]]  # the middles of two halves of 13
    dropped = [one for one in range(PATCHES) if one not in chosen]
    assert kept(pruner) == [sorted([*chosen, dropped[-1]])]
    tokens = []
    for one in chosen:
        near = best(np.where(np.arange(PATCHES) == one, -9, cosine[one]), min(NEIGHBOURS, PATCHES - 1))
        tokens.append(states[one] + sum(attention[other] * states[other] for other in near))
    tokens.append(sum(attention[other] * states[other] for other in dropped))
    projected = model.base_model.multi_modal_projector(torch.tensor(np.stack(tokens)).float())
    torch.testing.assert_close(recorded.decision.states[0, [*chosen, dropped[-1]]], projected, atol=1e-4, rtol=1e-4)


def test_vscan_scans_windows_and_merges() -> None:
    model = sharp_model()
    scan = VScan(windows=2).at_stage(0)
    inputs = build_inputs("llava", (("image",),))
    recorded = Recorded(scan)
    with attach(model, recorded, schedule=Schedule(((0, 9),))) as pruner:
        model(**inputs)
    attention = tower_of(model, inputs)["attention"][0, :, :, 0, 1:].mean(1)
    windows = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    local = [max(window, key=lambda one: attention[0, one]) for window in windows]
    chosen = local + [one for one in best(attention[-1], PATCHES) if one not in local][:5]
    assert kept(pruner) == [sorted(chosen)]
    states = embeddings_of(model, inputs)[0, visual_mask(inputs)[0]].double().numpy()
    groups = {one: [states[one]] for one in chosen}
    for one in set(range(PATCHES)) - set(chosen):
        groups[max(chosen, key=lambda other: cosines(states[[one]], states[[other]])[0, 0])].append(states[one])
    means = np.stack([np.mean(group, axis=0) for group in groups.values()])
    np.testing.assert_allclose(recorded.decision.states[0, chosen].numpy(), means, atol=1e-5)


def test_vscan_prunes_inside_as_pyramiddrop_does() -> None:
    model, schedule = sharp_model(), Schedule(((0, 9), (3, 4)))
    policy = VScan()
    with attach(model, policy, schedule=schedule) as pruner:
        model(**build_inputs("llava", ROWS))
    assert [stage.counts for stage in pruner.trace] == [(9, 9, 0), (4, 4, 0)]
    assert isinstance(policy.at_stage(1), PyramidDrop)
    for stages in (((0, 9),), ((2, 9), (3, 4)), ((0, 9), (2, 4), (3, 2))):
        with pytest.raises(ValueError, match="VScan prunes before the language model and once inside"):
            attach(model, VScan(), schedule=Schedule(stages))


# --- inside the decoder ---


def test_dart_keeps_what_resembles_the_pivots_least() -> None:
    model, layer, keep = sharp_model(), 2, 11
    recorded, pruner, inputs = decided(model, DART(visual_pivots=2, text_pivots=3), keep, layer)
    output = model(**inputs, output_hidden_states=True, use_cache=True)
    keys = output.past_key_values.layers[layer - 1].keys.double().numpy()  # [B, H, N, D]
    states = decoder_of(model).norm(output.hidden_states[layer]).double().numpy()
    for row, visual in enumerate(visual_mask(inputs).numpy()):
        if not visual.any():
            continue
        slots = visual.nonzero()[0]
        norms = np.abs(keys[row]).sum((0, 2))
        text = np.arange(slots[-1] + 1, len(norms))
        first, asked = slots[best(norms[slots], 2)], text[best(norms[text], 3)]
        chosen, left = set(first), [slot for slot in slots if slot not in first]
        for number, pivot in enumerate([*sorted(first), *sorted(asked)]):
            share = (keep - 2) // 5 + (number < (keep - 2) % 5)
            near = cosines(states[row, [pivot]], states[row, left])[0]
            taken = [left[one] for one in sorted(range(len(left)), key=lambda one, near=near: near[one])[:share]]
            chosen |= set(taken)
            left = [slot for slot in left if slot not in taken]
        assert len(chosen) == keep and kept(pruner)[row] == [list(slots).index(slot) for slot in sorted(chosen)]
    visual_keys, text_keys = recorded.context.visual_index.shape, recorded.context.text_states().valid.shape
    assert visual_keys[0] == text_keys[0] == len(ROWS)


def test_fitprune_multiplies_the_attention_of_question_and_picture() -> None:
    model, layer = sharp_model(), 2
    recorded, _, inputs = decided(model, FitPrune(), 7, layer)
    peaks = model(**inputs, output_attentions=True).attentions[layer - 1].amax(1).double().numpy()
    for row, visual in enumerate(visual_mask(inputs).numpy()):
        if not visual.any():
            continue
        slots = visual.nonzero()[0]
        of_question = [sum(peaks[row, query, slot] for query in range(slots[-1] + 1, len(visual))) for slot in slots]
        of_picture = [sum(peaks[row, query, slot] for query in slots) for slot in slots]
        found = recorded.decision.scores[row, : len(slots)].numpy()
        np.testing.assert_allclose(found, np.multiply(of_question, of_picture), rtol=1e-4)


@pytest.mark.parametrize("keep", [0, 1, 3, 16])
def test_dart_at_small_budgets(keep: int) -> None:
    _, pruner, _ = decided(sharp_model(), DART(), keep, 2)
    assert pruner.trace[0].counts == (keep, keep, 0)
