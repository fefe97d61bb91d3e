"""Methods for videos, again in plain code, and what they refuse."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.tiny_families import VIDEO_GRID, build_inputs, build_model
from toprl_models import METHODS, Schedule, attach
from toprl_models.methods import FastVID
from toprl_models.methods._video import VideoPolicy, portions

VIDEO_METHODS = [name for name, method in METHODS.items() if method.inputs == ("videos",)]
ROWS = (("video",), (), ("video", "video"))
TOKENS = VIDEO_GRID[0] * VIDEO_GRID[1] * VIDEO_GRID[2] // 4


@functools.cache
def model_of(family: str) -> Any:
    return build_model(family)


def video(frames: int = 9, tokens: int = 6, width: int = 16) -> Tensor:
    """A video whose frames are alike to different degrees."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(1, tokens, width, generator=generator)
    return base + torch.randn(frames, tokens, width, generator=generator) * torch.rand(
        frames, 1, 1, generator=generator
    )


def taken(name: str, frames: Tensor, keep: int) -> set[tuple[int, int]]:
    """The tokens that a method keeps: frame and place."""
    policy = METHODS[name].make()
    assert isinstance(policy, VideoPolicy)
    ranks = policy.rank(frames, keep)
    best = ranks.flatten().argsort(descending=True, stable=True)[:keep].tolist()
    return {divmod(one, frames.shape[1]) for one in best}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / np.linalg.norm(a.numpy()) / np.linalg.norm(b.numpy()))


@pytest.mark.parametrize("keep", [4, 6, 17, 54])
def test_evs_keeps_the_first_frame_and_what_changed(keep: int) -> None:
    frames = video().double()
    places = [(t, n) for t in range(9) for n in range(6)]
    changes = {(t, n): 1 - cosine(frames[t, n], frames[t - 1, n]) if t else 255.0 for t, n in places}
    assert taken("evs", frames, keep) == set(sorted(places, key=lambda one: -changes[one])[:keep])


def test_vidcom2_prefers_frames_and_tokens_that_stand_out() -> None:
    frames, keep = video().double(), 20
    flat = frames.flatten(0, 1).numpy()
    channels = sorted(range(16), key=lambda one: flat[:, one].var())[:8]
    unit = frames.numpy()[:, :, channels]
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)

    def likeness(mean: np.ndarray, one: np.ndarray) -> float:
        return sum(np.exp(-((one - mean) ** 2).sum() / (2 * 2.0**power)) for power in range(-3, 2))

    to_video = np.array([[likeness(unit.reshape(-1, 8).mean(0), one) for one in frame] for frame in unit])
    to_frame = np.array([[likeness(frame.mean(0), one) for one in frame] for frame in unit])
    weights = np.exp(-(to_video.mean(1) - to_video.mean(1).min()) / 0.01)
    weights = weights / weights.sum()
    shares = portions(keep, list(1 + weights - weights.mean()), 6)
    fair = [keep / 9 * (1 + weight - weights.mean()) for weight in weights]
    assert sum(shares) == keep and len(set(shares)) > 1
    assert all(abs(share - part) < 1 for share, part in zip(shares, fair, strict=True))
    expected = {
        (t, n) for t, share in enumerate(shares) for n in np.argsort((to_video + to_frame)[t], kind="stable")[:share]
    }
    assert taken("vidcom2", frames, keep) == expected


@pytest.mark.parametrize("keep", [7, 18, 30, 54])
def test_dycoke_compares_frames_of_four(keep: int) -> None:
    frames = video().double()
    whole, earlier = (0, 4, 8), {1: 0, 2: 0, 3: 2, 5: 4, 6: 4, 7: 6}
    found = taken("dycoke", frames, keep)
    if keep < 18:
        assert {t for t, _ in found} == set(whole)
        return
    assert {(t, n) for t in whole for n in range(6)} <= found
    for t, other in earlier.items():
        ranked = sorted(range(6), key=lambda n, t=t, other=other: cosine(frames[t, n], frames[other, n]))
        mine = [n for n in range(6) if (t, n) in found]
        assert sorted(ranked[: len(mine)]) == mine
        assert abs(len(mine) - (keep - 18) / 6) < 1


def test_fastvid_merges_segments() -> None:
    frames, keep, n = video(tokens=12).double(), 40, 12
    attention = torch.rand(9, n, generator=torch.Generator().manual_seed(1)).softmax(1)
    policy = FastVID(segments=3, threshold=-1, step=2)
    segments = policy.cut(frames)
    means = [frame.mean(0) for frame in frames]
    likeness = {t: cosine(means[t], means[t + 1]) for t in range(8)}
    ends = sorted(sorted(likeness, key=likeness.__getitem__)[:2])
    assert [list(one) for one in segments] == [
        list(range(0, ends[0] + 1)),
        list(range(ends[0] + 1, ends[1] + 1)),
        list(range(ends[1] + 1, 9)),
    ]
    numbers = policy.numbers(segments, n, 16)
    assert sum(numbers) == 16
    for segment in segments:  # every second frame, from the last one
        assert all((numbers[t] > 0) == ((segment[-1] - t) % 2 == 0) for t in segment)
    chosen, states = policy.reduce(frames, keep, attention)
    assert chosen.sum() == keep
    salient = [set(attention[t].topk(int(chosen[t].sum()) - numbers[t]).indices.tolist()) for t in range(9)]
    merged = 0
    for segment in segments:
        for t in segment:
            targets = [n for n in range(12) if chosen[t, n] and n not in salient[t]]
            assert targets == sorted(by_density(frames[t], [n for n in range(12) if n not in salient[t]], numbers[t]))
            joined: dict[int, list[Tensor]] = {target: [] for target in targets}
            for other in segment:
                for place in set(range(n)) - salient[other] if targets else ():
                    if other != t or place not in targets:
                        near = max(targets, key=lambda one, o=other, p=place, t=t: cosine(frames[t, one], frames[o, p]))
                        joined[near].append(frames[other, place])
            for target, others in joined.items():
                weight = max(0.6, 1 / (1 + len(others)))
                mean = torch.stack(others).mean(0) if others else torch.zeros(16)
                torch.testing.assert_close(states[t, target], weight * frames[t, target] + (1 - weight) * mean)
                merged += len(others)
    assert merged and torch.equal(states[0, sorted(salient[0])], frames[0, sorted(salient[0])])


def by_density(frame: Tensor, places: list[int], count: int) -> list[int]:
    """The places with the largest density times distance to a denser one."""
    points = {one: frame[one].numpy() for one in places}
    distance = {(a, b): float(np.linalg.norm(points[a] - points[b])) / 4 for a in places for b in places}
    density = {a: np.exp(-np.mean([d**2 for d in sorted(distance[a, b] for b in places)[:4]])) for a in places}
    peak = {
        a: min([distance[a, b] for b in places if density[b] > density[a]] or [max(distance.values())]) for a in places
    }
    return sorted(places, key=lambda one: -peak[one] * density[one])[:count]


def test_fastvid_reads_the_attention_of_frames() -> None:
    """Of the mean query to the mean keys of four patches that follow each other; in the windows' order by value."""
    model, inputs, seen = model_of("qwen2_5_vl"), build_inputs("qwen2_5_vl", ROWS[:1]), {}

    class Read(FastVID):
        def read(self, recorded: Any, context: Any) -> Tensor:
            seen["attention"], seen["calls"] = super().read(recorded, context), recorded["calls"]
            return seen["attention"]

    with attach(model, Read(), schedule=Schedule(((0, 0.5),))):
        model(**inputs)
    frames, tokens = VIDEO_GRID[0], TOKENS // VIDEO_GRID[0]
    query = torch.cat([call.query for call in seen["calls"]], 2)[0].unflatten(1, (frames, -1)).double()
    key = torch.cat([call.key for call in seen["calls"]], 2)[0].unflatten(1, (frames, tokens, 4)).double()
    for frame, found in enumerate(seen["attention"].view(frames, tokens)):
        weights = torch.zeros(tokens).double()
        for q, k in zip(query[:, frame], key[:, frame], strict=True):
            weights += torch.stack([q.mean(0) @ one.mean(0) / len(q[0]) ** 0.5 for one in k]).softmax(0) / len(query)
        torch.testing.assert_close(found.sort().values.double(), weights.sort().values, atol=1e-5, rtol=1e-4)
    assert seen["attention"].std() > 0


def test_portions() -> None:
    assert portions(6, [1.0, 2.0, 1.0], 4) == [2, 3, 1] and portions(0, [1.0, 1.0], 4) == [0, 0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        weights = torch.rand(int(torch.randint(1, 6, (), generator=generator)), generator=generator).tolist()
        budget = int(torch.randint(0, 30, (), generator=generator))
        shares = portions(budget, weights, 5)
        assert sum(shares) == min(budget, 5 * len(weights)) and all(0 <= share <= 5 for share in shares)


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", VIDEO_METHODS)
def test_a_batch_of_videos_is_its_rows(name: str, family: str) -> None:
    """Counts are the schedule's, each video has its share, and rows do not see each other."""
    model, schedule, policy = model_of(family), Schedule(((0, 0.5),)), METHODS[name].make()
    inputs = build_inputs(family, ROWS)
    with attach(model, policy, schedule=schedule) as pruner:
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, -3:]
        batch = pruner.trace[0]
        assert batch.counts == (TOKENS // 2, 0, TOKENS)
        second = batch.indices[2][batch.indices[2] >= 0]
        assert (second < TOKENS).sum() == TOKENS // 2
        alone = model.generate(**build_inputs(family, ROWS[:1]), max_new_tokens=3, do_sample=False)[:, -3:]
        assert pruner.trace[0].indices[0].tolist() == batch.indices[0, : TOKENS // 2].tolist()
        assert torch.equal(alone[0], tokens[0])
        pruned = model(**inputs).logits[0, -1]
        with pytest.raises(ValueError, match=f"{type(policy).__name__} is defined for videos, not for images"):
            model(**build_inputs(family, (("image",),)))
    assert not torch.allclose(pruned, model(**inputs).logits[0, -1], atol=1e-4)


@pytest.mark.parametrize("name", VIDEO_METHODS)
def test_models_without_frames_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="takes no video_grid_thw, which tells the frames of a video"):
        attach(model_of("llava"), METHODS[name].make(), schedule=Schedule(((0, 0.5),)))
    with pytest.raises(ValueError, match="use one stage at layer 0"):
        attach(model_of("qwen2_5_vl"), METHODS[name].make(), schedule=Schedule(((1, 0.5),)))
