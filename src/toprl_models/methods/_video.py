"""Base of methods that choose the tokens of videos frame by frame, before layer 0."""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from toprl_models.families import Family
from toprl_models.methods._tower import KEPT, Recorder, after_first_layers, check_before_llm, split_rows, tile_shares
from toprl_models.policy import Decision, Policy, StageContext

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from toprl_models.schedule import Schedule

# The argument that tells the frames of a video
GRID = "video_grid_thw"


def without_frames(family: Family) -> str:
    """Say why a method for videos does not apply to a family; "" where it does."""
    model = getattr(transformers, family.model_class)
    return takes_no_grid(model) or after_first_layers(family)


def takes_no_grid(model: type[PreTrainedModel]) -> str:
    """Say that a class of models cannot be told the frames of a video; "" where it can."""
    if GRID in inspect.signature(model.forward).parameters:
        return ""
    return f"{model.__name__} takes no {GRID}, which tells the frames of a video"


class VideoPolicy(Policy):
    """Base of methods for videos: override ``rank``.

    A frame is what the model's processor makes one: of Qwen's models two pictures of the video. The tokens of a prompt
    are shared among its videos in proportion to their tokens. One instance serves one attached model at a time.

    Raises:
        ValueError: by ``attach``, for another schedule than one stage at layer 0, or a model that takes no
            ``video_grid_thw``; in the forward pass, for prompts with images.
    """

    positions = "renumbered"
    uses_text = False

    @abstractmethod
    def rank(self, video: Tensor, keep: int) -> Tensor:
        """Score the tokens of a video, ``[t, n, d]`` with n tokens of each of t frames: ``[t, n]``, at most 1.

        The ``keep`` best stay.
        """

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        check_before_llm(self, schedule)
        if reason := takes_no_grid(type(model)):
            raise ValueError(f"model: {reason}; {type(self).__name__} needs them, choose another method")

    def recorder(self, model: PreTrainedModel) -> Recorder:
        """Make the recorder of what ``read`` needs."""
        return Recorder(model.base_model)

    def hooks(self, model: PreTrainedModel) -> list[RemovableHandle]:
        self._merge = int(model.config.vision_config.spatial_merge_size)
        self._recorder = self.recorder(model)
        self._recorder.handles.append(VideoWatch(model.base_model, self._recorder))
        return self._recorder.handles

    def reduce(self, video: Tensor, keep: int, attention: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return ``rank`` and, of methods that merge, new states ``[t, n, d]``; ``attention`` is what ``read`` gave."""
        return self.rank(video, keep), None

    def read(self, seen: Mapping[str, Any], context: StageContext) -> Tensor | None:
        """Return a number for each token of all videos, ``[N]``, from what the tower did; None where it is not read."""
        return None

    def decide(self, context: StageContext) -> Decision:
        """Score as ``rank`` does, float32 ``[B, V]``; 2 more for what stays of a video, -1 for padding."""
        scores = torch.full(context.valid_mask.shape, -1.0, device=context.valid_mask.device)
        states, (grids, values) = None, self._grids(context)
        lengths = [frames * tokens for frames, tokens in grids]
        repeats, videos = split_rows(lengths, context.num_visual) if lengths else (1, [range(0)] * len(scores))
        starts = [0, *itertools.accumulate(lengths)]
        for row, keep in enumerate(context.num_keep):
            numbers = videos[row // repeats]
            slots = context.valid_mask[row].nonzero()[:, 0].split([lengths[number] for number in numbers])
            sizes = [len(part) for part in slots]
            for number, part, share in zip(numbers, slots, tile_shares(keep, sizes, sizes), strict=True):
                video = context.hidden_states[row, part].float().unflatten(0, grids[number])
                mine = None if values is None else values[starts[number] : starts[number + 1]].view(video.shape[:2])
                if 0 < share < len(part):
                    ranks, tokens = self.reduce(video, share, mine)
                    if tokens is not None:
                        states = context.hidden_states.clone() if states is None else states
                        states[row, part] = tokens.flatten(0, 1).to(states.dtype)
                else:  # all of it, or nothing
                    ranks = video.new_zeros(video.shape[:2])
                ranks = ranks.flatten().to(scores.dtype)
                ranks[ranks.argsort(descending=True, stable=True)[:share]] += KEPT
                scores[row, part] = ranks
        return Decision(scores, states=states)

    def _grids(self, context: StageContext) -> tuple[list[tuple[int, int]], Tensor | None]:
        """Return the frames of each video and the tokens of a frame, and what ``read`` does."""
        if not any(context.num_visual):
            return [], None
        inputs = context.inputs
        encoded = inputs.get("mm_encoder_outputs") or {}
        has_images = inputs.get("pixel_values") is not None or encoded.get("image") is not None
        if has_images:
            raise ValueError(
                f"pixel_values: {type(self).__name__} is defined for videos, not for images; prune this prompt by "
                "another method"
            )
        seen = self._recorder.take()
        grids = [(t, height * width // self._merge**2) for t, height, width in seen[GRID].tolist()]
        return grids, self.read(seen, context)


class VideoWatch:
    """Recorder of the grids of the videos that a model encodes.

    In ``generate()`` nothing but ``get_video_features`` gets them, a method, which no module hook sees. This method of
    one instance is watched until ``remove()``; its results pass through untouched.
    """

    def __init__(self, base: PreTrainedModel, recorder: Recorder) -> None:
        self._base, encode = weakref.ref(base), base.get_video_features
        signature = inspect.signature(encode)

        @functools.wraps(encode)
        def watched(*args: Any, **kwargs: Any) -> object:
            recorder.record(GRID, signature.bind(*args, **kwargs).arguments[GRID])
            return encode(*args, **kwargs)

        base.get_video_features = watched

    def remove(self) -> None:
        if (base := self._base()) is not None:
            vars(base).pop("get_video_features", None)


def portions(budget: int, weights: Sequence[float], capacity: int) -> list[int]:
    """Divide ``budget`` tokens among frames of ``capacity`` in proportion to ``weights``; none has more than it holds.

    Each is rounded to the nearest number so that the sum is ``min(budget, len(weights) * capacity)``.

    Example:
        >>> portions(6, [1.0, 2.0, 1.0], 4), portions(9, [1.0, 8.0, 1.0], 4)
        ([2, 3, 1], [2, 4, 3])
    """
    shares, left, total = [0] * len(weights), budget, sum(weights)
    order = sorted(range(len(weights)), key=lambda frame: -weights[frame])
    for place, frame in enumerate(order):
        fair = round(left * weights[frame] / total) if total else left // (len(order) - place)
        # those that follow must hold what this one does not take
        least = left - capacity * (len(order) - place - 1)
        shares[frame] = min(capacity, max(fair, least, 0))
        left, total = left - shares[frame], total - weights[frame]
    return shares
