"""Each method's scores and choices again, in plain code from the unattached model's own attention and embeddings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.agreement import kept_slots, masked_by_hand, model_of
from tests.models.tiny_families import FAMILY_NAMES, HIDDEN_SIZE, TINY, build_inputs, build_model, visual_mask
from toprl_kernels import flops
from toprl_models import Schedule, StageContext, TopRLPolicy, attach
from toprl_models.methods._dpc_knn import GOLDEN_RATIO, NOISE, cluster_means, dpc_knn
from toprl_models.methods.divprune import DivPrune, pick_order
from toprl_models.methods.fastv import FastV
from toprl_models.methods.fastv_progressive import FastVProgressive
from toprl_models.methods.oneshot import OneShot
from toprl_models.methods.pyramiddrop import PyramidDrop
from toprl_models.methods.random import RandomPolicy
from toprl_models.methods.sparsevlm import SparseVLM, recycled
from toprl_models.probe import decoder_of

ROWS = (("image",), ("image", "image"), ())
# float32 sums of at most 1 in another order
TOLERANCE = {"atol": 1e-5, "rtol": 0}
families = pytest.mark.parametrize("family", FAMILY_NAMES)


def embeddings_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What enters layer 0, ``[B, N, d]``."""
    seen = []
    handle = decoder_of(model).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    return seen[0]


def attentions_of(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Post-softmax attention ``[B, H, N, N]`` of each layer of the unattached model."""
    return model(**inputs, output_attentions=True).attentions


def last_row(attention: Tensor, seen: Tensor) -> Tensor:
    """Head mean of the last token's attention to the tokens that ``seen`` [N] marks; attention ``[H, N, N]``."""
    return attention.mean(0)[-1][seen]


def assert_scores(pruner: Any, stage: int, expected: list[Tensor]) -> None:
    """Scores of each row's visual tokens, in raster order."""
    trace = pruner.trace[stage]
    for scores, index, row in zip(trace.scores, trace.visual_index, expected, strict=True):
        torch.testing.assert_close(scores[index >= 0], row, **TOLERANCE)


# --- FastV, FastV-P, PyramidDrop ---


@families
@pytest.mark.parametrize(("policy", "lag"), [(FastV(), 1), (FastVProgressive(), 1), (PyramidDrop(), 0)])
def test_score_is_the_last_tokens_attention(family: str, policy: Any, lag: int) -> None:
    model, inputs, layer = model_of(family, "eager"), build_inputs(family, ROWS), 3
    attention = attentions_of(model, inputs)[layer - lag]
    visual = visual_mask(inputs)
    with attach(model, policy, schedule=Schedule(((layer, 0.5),))) as pruner:
        model(**inputs)
    assert_scores(pruner, 0, [last_row(attention[row], visual[row]) for row in range(len(visual))])
    other = attentions_of(model, inputs)[layer - 1 + lag]  # the layer of the other kind of method
    assert (last_row(attention[0], visual[0]) - last_row(other[0], visual[0])).abs().max() > 1e-3


@families
@pytest.mark.parametrize(
    ("policy", "lag"), [(FastVProgressive(), 1), (PyramidDrop(positions="original"), 0)], ids=["fastv", "pyramiddrop"]
)
def test_score_of_a_later_stage_is_among_the_survivors(family: str, policy: Any, lag: int) -> None:
    """Positions stay, so that the survivors' attention is that of a model whose masks lose the dropped keys."""
    model, inputs = model_of(family, "eager"), build_inputs(family, ROWS)
    with attach(model, policy, schedule=Schedule(((2, 0.5), (4, 0.25)))) as pruner:
        model(**inputs)
    weights = []
    layer = decoder_of(model).layers[4 - lag]
    handle = layer.self_attn.register_forward_hook(lambda _, args, output: weights.append(output[1]))
    masked_by_hand(model, inputs, pruner.trace[:1])
    handle.remove()
    alive = kept_slots(inputs, pruner.trace[0]) & visual_mask(inputs)
    assert_scores(pruner, 1, [last_row(weights[0][row], alive[row]) for row in range(len(alive))])


def test_pyramiddrop_scores_renumbered_survivors() -> None:
    """Behind a stage at layer 0 all is the language model on a shorter prompt with positions from 0."""
    model, inputs = model_of("llava", "eager"), build_inputs("llava", (("image", "image"),))
    embeddings = embeddings_of(model, inputs)
    with attach(model, PyramidDrop(), schedule=Schedule(((0, 0.5), (2, 0.25)))) as pruner:
        model(**inputs)
    alive = kept_slots(inputs, pruner.trace[0])[0]
    short = decoder_of(model)(inputs_embeds=embeddings[:, alive], output_attentions=True)
    assert_scores(pruner, 1, [last_row(short.attentions[2][0], visual_mask(inputs)[0][alive])])


# --- SparseVLM ---


def raters_by_hand(visual: Tensor, text: Tensor) -> list[int]:
    """Numbers of the text tokens [R, d] above the mean of softmax over text, averaged over visual tokens [V, d]."""
    share = torch.stack([(text @ one).softmax(0) for one in visual]).mean(0)
    return [number for number, value in enumerate(share) if value > share.mean()]


def rating_by_hand(attention: Tensor, raters: list[int], visual: Tensor) -> Tensor:
    """Attention [H, N, N] of the ``raters``, slots of text, to the ``visual`` slots."""
    return torch.stack([attention.mean(0)[slot, visual] for slot in raters]).mean(0)


@families
def test_sparsevlm_rates_by_the_raters_attention(family: str) -> None:
    model, inputs, layer = model_of(family, "eager"), build_inputs(family, ROWS), 3
    attention, embeddings = attentions_of(model, inputs)[layer - 1], embeddings_of(model, inputs)
    with attach(model, SparseVLM(), schedule=Schedule(((layer, 0.5),))) as pruner:
        model(**inputs)
    expected, rated = [], []
    for row, seen in enumerate(visual_mask(inputs)):
        visual = seen.nonzero().flatten()
        if not len(visual):
            expected.append(torch.zeros(0))
            continue
        first = int(visual[-1]) + 1
        raters = raters_by_hand(embeddings[row, visual], embeddings[row, first:])
        rated.append(len(raters) < seen.shape[0] - first)
        expected.append(rating_by_hand(attention[row], [first + number for number in raters], visual))
    assert all(rated)  # not all of the text
    assert_scores(pruner, 0, expected)


def dpc_knn_by_hand(points: list[Tensor], count: int) -> list[list[int]]:
    """Clusters of points, each a list of their numbers, by descending score of their centres."""
    width = math.sqrt(len(points[0]))
    distance = [[float((one - other).norm()) / width for other in points] for one in points]
    # the noise orders equal densities: of nearest neighbours, or of points so far apart that exp() is 0
    density = [
        math.exp(-sum(one**2 for one in sorted(row)[:count]) / count) + NOISE * ((number + 1) * GOLDEN_RATIO % 1)
        for number, row in enumerate(distance)
    ]
    farthest = max(max(row) for row in distance)
    score = []
    for number, row in enumerate(distance):
        denser = [one for other, one in enumerate(row) if density[other] > density[number]]
        score.append(density[number] * min(denser, default=farthest))
    centres = sorted(range(len(points)), key=score.__getitem__, reverse=True)[:count]
    clusters: list[list[int]] = [[] for _ in centres]
    for number, row in enumerate(distance):
        near = min(range(count), key=lambda one: row[centres[one]])
        clusters[centres.index(number) if number in centres else near].append(number)
    return clusters


def sparsevlm_by_hand(
    model: Any, inputs: dict[str, Tensor], keeps: dict[int, int], recycle: bool
) -> tuple[Tensor, list[int]]:
    """Last logits and the tokens behind each stage, layer by layer, for one prompt with one image."""
    decoder = decoder_of(model)
    embeddings = embeddings_of(model, inputs)[0]
    visual = visual_mask(inputs)[0].nonzero().flatten()
    first, count = int(visual[0]), len(visual)
    raters = raters_by_hand(embeddings[visual], embeddings[first + count :])
    states, counts, weights = embeddings, [], torch.zeros(0)
    for number, layer in enumerate(decoder.layers):
        if number in keeps:
            slots = torch.arange(first, first + count)
            rating = rating_by_hand(weights, [first + count + one for one in raters], slots)
            best = rating.sort(descending=True).indices.tolist()
            kept, dropped = sorted(best[: keeps[number]]), best[keeps[number] :]
            image = [states[first + one] for one in kept]
            if recycle:
                merged = [states[first + one] for one in dropped[: int(len(dropped) * 0.3) + 1]]
                for cluster in dpc_knn_by_hand(merged, int(len(merged) / 10) + 1):
                    image.append(torch.stack([merged[one] for one in cluster]).mean(0))
            states = torch.cat([states[:first], torch.stack(image), states[first + count :]])
            count = len(image)
            counts.append(count)
        length = len(states)
        causal = torch.full((1, 1, length, length), torch.finfo(states.dtype).min, dtype=states.dtype).triu(1)
        tables = decoder.rotary_emb(states[None], torch.arange(length)[None])
        seen: list[Tensor] = []
        handle = layer.self_attn.register_forward_hook(lambda _, args, output, seen=seen: seen.append(output[1]))
        states = layer(states[None], attention_mask=causal, position_embeddings=tables)[0]
        handle.remove()
        weights = seen[0][0]
    return model.lm_head(decoder.norm(states))[-1], counts


@pytest.mark.parametrize("recycle", [True, False])
def test_sparsevlm_is_the_whole_method(recycle: bool) -> None:
    """Raters, rating, recycling, order and positions of three stages: 52 tokens keep 12, 8 and 3."""
    model, inputs = build_model("llava_next", "eager").double(), build_inputs("llava_next")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    keeps = {1: 12, 3: 8, 4: 3}
    logits, counts = sparsevlm_by_hand(model, inputs, keeps, recycle)
    assert counts == ([14, 9, 4] if recycle else [12, 8, 3])
    with attach(model, SparseVLM(recycle=recycle), schedule=Schedule(tuple(keeps.items()))) as pruner:
        pruned = model(**inputs).logits[0, -1]
    assert [stage.counts for stage in pruner.trace] == [(count,) for count in counts]
    torch.testing.assert_close(pruned, logits, atol=1e-5, rtol=0)  # clusters' means are float32
    assert (model(**inputs).logits[0, -1] - logits).abs().max() > 0.1


@pytest.mark.parametrize(
    ("keeps", "counts", "average"),
    [
        ((300, 200, 110), (309, 204, 113), 206.5),
        ((303, 110, 36), (312, 117, 39), 4653 / 32),
        ((66, 30, 17), (82, 32, 18), 82.25),
    ],
)
def test_sparsevlm_counts_what_it_merges(keeps: tuple[int, ...], counts: tuple[int, ...], average: float) -> None:
    schedule = Schedule(tuple(zip((3, 7, 16), keeps, strict=True)))
    assert SparseVLM().counts(schedule, 576) == counts
    assert SparseVLM(recycle=False).counts(schedule, 576) == keeps
    stages = tuple(zip(schedule.layers, counts, strict=True))
    assert flops.average_tokens(576, stages, 32) == average


def context_of(states: Tensor, valid: Tensor, num_keep: tuple[int, ...]) -> StageContext:
    """A stage in which only the visual states matter."""

    def unused() -> Any:
        raise AssertionError("not read")

    batch, width = valid.shape
    index = torch.arange(width).expand(batch, -1).masked_fill(~valid, -1)
    num_visual = tuple(valid.sum(1).tolist())
    return StageContext(
        0, 1, states, valid, index, num_visual, num_keep, states[:, 0], unused, unused, unused, inputs={}
    )


def test_recycled_tokens_stand_behind_the_kept_ones() -> None:
    states = torch.arange(12.0).view(2, 6, 1).repeat(1, 1, 4)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3, 0.7]]).repeat(2, 1)
    decision = recycled(context_of(states, valid, (3, 3)), scores)
    keep, new = decision.keep_mask, decision.states
    assert keep is not None and new is not None
    # row 0 keeps 1, 3, 5 and recycles the best of the others, 4, behind them
    assert keep[0].tolist() == [False, True, False, True, True, True]
    assert new[0, keep[0], 0].tolist() == [1, 3, 5, 4]
    # row 1 would recycle the one token that it drops: nothing changes
    assert keep[1].tolist() == valid[1].tolist()
    assert new[1, keep[1], 0].tolist() == [6, 7, 8, 9]


def test_merged_token_is_the_mean_of_its_cluster() -> None:
    """40 of 42 tokens are dropped, the 13 best of them in two heaps: two tokens behind the two that stay."""
    heaps = torch.tensor([[0.0, 0.0], [10.0, 10.0]])
    states = torch.zeros(1, 42, 2)
    states[0, 2:15] = heaps[torch.arange(13) % 2] + 0.1 * torch.rand(13, 2)
    states[0, 40:] = torch.tensor([[50.0, 50.0], [60.0, 60.0]])
    scores = torch.zeros(1, 42)
    scores[0, 2:15], scores[0, 40:] = torch.linspace(2, 1, 13), torch.tensor([4.0, 3.0])
    decision = recycled(context_of(states, torch.ones(1, 42, dtype=torch.bool), (2,)), scores)
    keep, new = decision.keep_mask, decision.states
    assert keep is not None and new is not None
    assert keep[0].nonzero().flatten().tolist() == [38, 39, 40, 41]
    assert new[0, 38:40, 0].tolist() == [50, 60]
    means = torch.stack([states[0, 2:15:2].mean(0), states[0, 3:15:2].mean(0)])
    merged = new[0, 40:]
    torch.testing.assert_close(merged[merged[:, 0].argsort()], means)


# --- DPC-KNN ---


def test_dpc_knn_of_points_on_a_line() -> None:
    """Two clusters: densities exp(-d^2 / 2) of the nearest neighbour at d = .1, .1, .15 and .2, .2; two heaps."""
    line = torch.tensor([0.0, 0.1, 0.25, 5.0, 5.2])[None, :, None]
    valid = torch.ones(1, 5, dtype=torch.bool)
    assignment, centres = dpc_knn(line, valid, torch.tensor([2]), 2)
    # 0 is the densest (its noise is above that of 1): .995 * 5.2; 3 is 4.75 from the nearest denser point: .980 * 4.75
    assert centres.tolist() == [[0, 3]]
    assert assignment.tolist() == [[0, 0, 0, 1, 1]]
    torch.testing.assert_close(cluster_means(line, assignment, 2).flatten(), torch.tensor([0.35 / 3, 5.1]))
    # with one cluster all densities are 1, and the noise is largest for point 2
    assignment, centres = dpc_knn(line, valid, torch.tensor([1]), 1)
    assert (assignment.tolist(), centres.tolist()) == ([[0] * 5], [[2]])


def test_distances_are_divided_by_the_root_of_the_width() -> None:
    """Points of which every coordinate repeats are as far apart as in one dimension: so are the densities."""
    line = 8 * torch.rand(1, 9, 1)
    valid, count = torch.ones(1, 9, dtype=torch.bool), torch.tensor([3])
    one, many = (dpc_knn(points, valid, count, 3) for points in (line, line.repeat(1, 1, 7)))
    assert torch.equal(one[0], many[0]) and torch.equal(one[1], many[1])
    # at the distances of seven coordinates there are other densities, and other centres
    assert not torch.equal(dpc_knn(line * 7**0.5, valid, count, 3)[1], one[1])


@pytest.mark.parametrize("padding", [float("nan"), 0.0])
def test_dpc_knn_of_ragged_rows_is_that_of_each_row(padding: float) -> None:
    points, lengths, counts = torch.randn(4, 12, 8), (12, 7, 1, 5), (3, 2, 1, 0)
    valid = torch.arange(12) < torch.tensor(lengths)[:, None]
    points[~valid] = padding
    assignment, centres = dpc_knn(points, valid, torch.tensor(counts), 3)
    means = cluster_means(points, assignment, 3)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        assert (assignment[row, length:] == -1).all() and (centres[row, count:] == -1).all()
        assert (means[row, count:] == 0).all()
        if not count:
            assert (assignment[row] == -1).all()
            continue
        clusters = dpc_knn_by_hand(list(points[row, :length]), count)
        found = [(assignment[row] == number).nonzero().flatten().tolist() for number in range(count)]
        assert found == clusters
        for number, cluster in enumerate(clusters):
            assert centres[row, number] in cluster
            torch.testing.assert_close(means[row, number], points[row, cluster].mean(0))


def test_equal_points_leave_no_cluster_empty() -> None:
    assignment, centres = dpc_knn(torch.ones(1, 6, 4), torch.ones(1, 6, dtype=torch.bool), torch.tensor([3]), 3)
    assert sorted(centres[0].tolist()) == sorted(set(centres[0].tolist()))
    assert set(assignment[0].tolist()) == {0, 1, 2}


# --- DivPrune ---


def picks_by_hand(points: Tensor, count: int) -> list[int]:
    """Greedy max-min selection with distance 1 - cosine over points [n, d], one after the other."""

    def apart(one: int, other: int) -> float:
        return 1 - float(torch.cosine_similarity(points[one], points[other], dim=0))

    everyone = range(len(points))
    picks = [max(everyone, key=lambda one: min(apart(one, other) for other in everyone if other != one))]
    while len(picks) < count:
        left = [one for one in everyone if one not in picks]
        picks.append(max(left, key=lambda one: min(apart(one, other) for other in picks)))
    return picks


def test_divprune_of_five_directions() -> None:
    """90 degrees is the loneliest; then 200, the farthest from it; then 0, 180 and 10."""
    angles = torch.tensor([0.0, 10, 90, 180, 200]).deg2rad()
    lengths = torch.tensor([1.0, 9, 0.1, 3, 2])  # that cosines do not see
    points = torch.stack([angles.cos(), angles.sin()], 1) * lengths[:, None]
    states = torch.zeros(2, 7, 2)
    states[0, :5], states[1, 2:] = points, points  # padding on either side
    valid = torch.zeros(2, 7, dtype=torch.bool)
    valid[0, :5] = valid[1, 2:] = True
    assert pick_order(states, valid, 5).tolist() == [[2, 4, 0, 3, 1, 7, 7], [7, 7, 2, 4, 0, 3, 1]]
    assert pick_order(states, valid, 2).tolist() == [[7, 7, 0, 7, 1, 7, 7], [7, 7, 7, 7, 0, 7, 1]]


def test_divprune_picks_no_token_twice() -> None:
    states, valid = torch.ones(2, 5, 3), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    assert pick_order(states, valid, 5).tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 5]]


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if not TINY[name].min_stage])
def test_divprune_selects_as_the_plain_loop(family: str) -> None:
    model, inputs = model_of(family), build_inputs(family, ROWS)
    embeddings = embeddings_of(model, inputs)
    with attach(model, DivPrune(), schedule=Schedule(((0, 0.222),))) as pruner:
        model(**inputs)
    trace = pruner.trace[0]
    for row, seen in enumerate(visual_mask(inputs)):
        kept = trace.indices[row][trace.indices[row] >= 0].tolist()
        assert len(kept) == math.floor(0.222 * int(seen.sum()) + 0.5)
        assert not kept or kept == sorted(picks_by_hand(embeddings[row, seen], len(kept)))


# --- one stage ---


def learned(**changes: Any) -> TopRLPolicy:
    torch.manual_seed(0)
    policy = TopRLPolicy(**({"hidden_size": HIDDEN_SIZE, "stage_layers": [1, 3, 4], "actor_size": 8} | changes))
    with torch.no_grad():
        policy.stage_bias.normal_(0, 3)
    return policy


@pytest.mark.parametrize(("stage", "expected"), [(None, 2), (0, 0), (1, 1)])
def test_oneshot_of_a_learned_policy_uses_the_bias_of_one_stage(stage: int | None, expected: int) -> None:
    model, inputs, policy = model_of("llava"), build_inputs("llava", ROWS), learned()
    states = model(**inputs, output_hidden_states=True).hidden_states[2]
    with attach(model, OneShot(policy, 2, stage=stage), schedule=Schedule(((2, 0.5),))) as pruner:
        model(**inputs)
    rows = []
    for row, seen in enumerate(visual_mask(inputs)):
        visual = states[row : row + 1, seen]
        logits = policy.logits(visual, expected, torch.ones(visual.shape[:2], dtype=torch.bool))[0]
        rows.append(logits[:, 0] - logits[:, 1])
    assert_scores(pruner, 0, rows)
    others = [policy.logits(states[:1, :5], one, torch.ones(1, 5, dtype=torch.bool)) for one in range(3)]
    assert (others[0] - others[2]).abs().max() > 1e-3  # another stage scores otherwise


@pytest.mark.parametrize("policy", [FastV(), PyramidDrop(), SparseVLM()], ids=lambda policy: type(policy).__name__)
def test_oneshot_of_one_stage_is_the_policy(policy: Any) -> None:
    model, inputs, schedule = model_of("llava"), build_inputs("llava", ROWS), Schedule(((2, 0.5),))
    outputs = []
    for one in (policy, OneShot(policy, 2)):
        assert one.counts(schedule, 16) == policy.counts(schedule, 16)
        with attach(model, one, schedule=schedule) as pruner:
            outputs.append((model(**inputs).logits, pruner.trace[0].indices))
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])


def test_oneshot_refuses_what_does_not_fit() -> None:
    model = model_of("llava")
    with pytest.raises(ValueError, match=r"layer=-1 must not be negative"):
        OneShot(FastV(), -1)
    with pytest.raises(ValueError, match=r"stage=3 .* 0\.\.2"):
        OneShot(learned(), 2, stage=3)
    with pytest.raises(ValueError, match=r"stage=1 .* 0\.\.0"):
        OneShot(RandomPolicy(), 2, stage=1)
    for stages in (((1, 0.5),), ((2, 0.5), (4, 0.25))):
        with pytest.raises(ValueError, match=r"OneShot\(layer=2\) prunes once"):
            attach(model, OneShot(FastV(), 2), schedule=Schedule(stages))
    with pytest.raises(ValueError, match="hidden_size=32"):
        attach(model, OneShot(learned(hidden_size=32), 2), schedule=Schedule(((2, 0.5),)))
    with pytest.raises(ValueError, match="one stage at layer 0"):
        attach(model, OneShot(DivPrune(), 2), schedule=Schedule(((2, 0.5),)))


def test_modes_and_layers_that_a_method_does_not_know_are_refused() -> None:
    model = model_of("llava")
    with pytest.raises(ValueError, match="one stage at layer 0"):
        attach(model, DivPrune(), schedule=Schedule(((0, 0.5), (2, 0.25))))
    for policy in (SparseVLM(), DivPrune()):
        with pytest.raises(ValueError, match="renumbered"):
            attach(model, policy, schedule=Schedule(((0 if isinstance(policy, DivPrune) else 1, 0.5),)), mode="mask")
