"""FastVID (Shen et al., NeurIPS 2025, "FastVID: Dynamic Density Pruning for Fast Video Large Language Models")."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from toprl_models.methods._dpc_knn import GOLDEN_RATIO, NOISE
from toprl_models.methods._layout import Layout
from toprl_models.methods._tower import (
    Recorder,
    TowerReader,
    check_features,
    check_merging,
    check_tower,
    sequences,
    split_rows,
    tile_shares,
)
from toprl_models.methods._video import VideoPolicy, without_frames
from toprl_models.policy import StageContext
from toprl_models.registry import BEFORE_LLM, register_method
from toprl_models.runtime.scores import Observation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from toprl_models.schedule import Schedule

# Neighbours of a token's density
NEIGHBOURS = 4


class VideoReader(TowerReader):
    """Reader of how much the frames of videos attend to their tokens."""

    @property
    def recorder(self) -> Recorder:
        return self._recorder

    def frame_attention(self, seen: Mapping[str, Any], context: StageContext) -> Tensor:
        """Compute the attention of each frame to its tokens, ``[N]`` of all videos.

        Of the mean query of a frame's patches to the mean keys of the patches of each token: softmax over the frame's
        tokens, mean over heads. As the authors compute it for Qwen2.5-VL.

        Raises:
            ValueError: the visual tokens of the prompt are not what the tower made last.
        """
        grids = self._layout.grids(seen["sizes"])
        frames = itertools.chain.from_iterable(map(sequences, seen["calls"]))
        found = [of_frame(frame, grid, self._layout) for frame, grid in zip(frames, grids, strict=True)]
        repeats, _ = split_rows([sum(map(len, found))], (sum(context.num_visual),))
        check_features(context, repeats, seen["features"])
        return torch.cat(found)


def of_frame(call: Observation, grid: tuple[int, int], layout: Layout) -> Tensor:
    """Compute the attention of one frame, of ``grid`` patches, to its tokens: ``[n]``."""
    query, key = call.query[0].float().mean(1), call.key[0].float().transpose(0, 1)  # [H, D], [patches, H, D]
    tokens = layout.merged(key.flatten(1), [grid]).unflatten(1, key.shape[1:])
    return ((tokens * query).sum(-1) / query.shape[1] ** 0.5).softmax(0).mean(1)


@register_method(
    "fastvid", "FastVID", "Shen et al., NeurIPS 2025", stages=BEFORE_LLM, refuses=without_frames, inputs=("videos",)
)
class FastVID(VideoPolicy):
    """Keep tokens that their frame attends to most, and merge the others of a segment into a few dense ones.

    A video is cut into segments between frames whose mean tokens have a cosine below ``threshold``, and at the
    ``segments - 1`` smallest cosines in any case. The share ``contextual_ratio`` of its tokens are contextual: of every
    fourth frame of a segment, from its last one backwards, the tokens with the largest density times distance to a
    denser token (four neighbours, as DPC-KNN). Tokens of the segment that do not stay join the most similar of them, in
    each such frame, and it becomes ``w`` times itself plus 1 - ``w`` times their mean, ``w`` = 1 / (1 + their number),
    but at least 0.6. The other tokens are those with most attention of their frame in the vision tower.

    Deviations: numbers are rounded so that they add up to the budget, and a frame has contextual tokens for half of its
    places at most. The authors' code for Qwen2.5-VL, whose thresholds and attention these are, skips frames within a
    segment that hardly change; here, as in that for LLaVA, each has its share. The noise on densities is fixed.

    Errors and use are those of ``VideoPolicy``; a model whose tower cannot be read is refused.

    Args:
        segments: least number of segments, at most the number of frames.
        threshold: cosine below which a segment ends.
        contextual_ratio: share of the contextual tokens.
        step: distance of the frames that have them.
        least_weight: of a contextual token itself.

    Raises:
        ValueError: ``segments`` or ``step`` below 1, ``contextual_ratio`` outside [0, 1].
    """

    def __init__(
        self,
        segments: int = 8,
        threshold: float = 0.84,
        contextual_ratio: float = 0.4,
        step: int = 4,
        least_weight: float = 0.6,
    ) -> None:
        if segments < 1 or step < 1:
            raise ValueError(f"segments={segments} and step={step} must be at least 1")
        if not 0 <= contextual_ratio <= 1:
            raise ValueError(f"contextual_ratio={contextual_ratio} must be in [0, 1]")
        self.segments, self.threshold, self.contextual_ratio = segments, threshold, contextual_ratio
        self.step, self.least_weight = step, least_weight

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        super().check(model, schedule)
        check_merging(self, schedule)
        check_tower(model)

    def recorder(self, model: PreTrainedModel) -> Recorder:
        self._reader = VideoReader(model)
        return self._reader.recorder

    def read(self, seen: Mapping[str, Any], context: StageContext) -> Tensor:
        return self._reader.frame_attention(seen, context)

    def reduce(self, video: Tensor, keep: int, attention: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rank what stays by 1, the rest by 0, and merge."""
        assert attention is not None
        tokens, states, taken = video.shape[1], video.clone(), torch.zeros_like(attention, dtype=torch.bool)
        segments = self.cut(video)
        contextual = self.numbers(segments, tokens, int(keep * self.contextual_ratio))
        salient = tile_shares(keep - sum(contextual), [tokens - number for number in contextual])
        for frame, number in enumerate(salient):
            taken[frame, attention[frame].argsort(descending=True, stable=True)[:number]] = True
        chosen = taken.clone()
        for segment in segments:
            part = slice(segment.start, segment.stop)
            for frame in segment:
                targets = densest(video[frame], ~taken[frame], contextual[frame])
                joining = ~taken[part].flatten()
                joining[(frame - segment.start) * tokens + targets] = False
                states[frame, targets] = self.joined(video[frame, targets], video[part].flatten(0, 1)[joining])
                chosen[frame, targets] = True
        return chosen.float(), states

    def cut(self, video: Tensor) -> list[range]:
        """Cut a video ``[t, n, d]`` into segments of its frames."""
        frames = normalize(video.mean(1), dim=-1)
        cosine = (frames[1:] * frames[:-1]).sum(-1)
        ends = set(cosine.argsort(stable=True)[: self.segments - 1].tolist())
        ends |= set((cosine < self.threshold).nonzero()[:, 0].tolist())
        bounds = [0, *(end + 1 for end in sorted(ends)), len(video)]
        return [range(start, stop) for start, stop in itertools.pairwise(bounds)]

    def numbers(self, segments: list[range], tokens: int, budget: int) -> list[int]:
        """Number the contextual tokens of each frame."""
        numbers = [0] * segments[-1].stop
        anchors = [range(segment.stop - 1, segment.start - 1, -self.step) for segment in segments]
        room = [len(frames) * (tokens // 2) for frames in anchors]
        for frames, share in zip(anchors, tile_shares(budget, room, [len(one) for one in segments]), strict=True):
            for frame, number in zip(frames, tile_shares(share, [tokens // 2] * len(frames)), strict=True):
                numbers[frame] = number
        return numbers

    def joined(self, targets: Tensor, others: Tensor) -> Tensor:
        """Merge ``others`` [m, d] into ``targets`` [k, d]."""
        if not len(targets):
            return targets
        nearest = (normalize(others, dim=-1) @ normalize(targets, dim=-1).T).argmax(1)
        number = nearest.bincount(minlength=len(targets))[:, None]
        means = torch.zeros_like(targets).index_add(0, nearest, others) / number.clamp(min=1)
        weight = (1 / (number + 1)).clamp(min=self.least_weight)
        return weight * targets + (1 - weight) * means


def densest(states: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Pick ``count`` of the ``candidates`` (bool ``[n]``) of a frame's ``states`` ``[n, d]``: density peaks."""
    places = candidates.nonzero()[:, 0]
    if not count:
        return places[:0]
    points = states[places]
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / states.shape[1] ** 0.5
    nearest = distance.topk(min(NEIGHBOURS, len(places)), largest=False).values
    noise = torch.arange(1, len(places) + 1, device=places.device) * GOLDEN_RATIO % 1
    density = (-nearest.square().mean(1)).exp() + NOISE * noise
    denser = density > density[:, None]
    peak = torch.where(denser, distance, distance.max()).amin(1)
    return places[(peak * density).argsort(descending=True, stable=True)[:count]]
