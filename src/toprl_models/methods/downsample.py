"""The plain smaller image: the control that a pruning method has to beat (arXiv 2511.02650, 2512.07580)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from toprl_models.methods._smaller import Source, smaller_grid, source_of, why_not
from toprl_models.methods._tower import (
    Recorder,
    after_first_layers,
    check_before_llm,
    check_features,
    refuse_videos,
    split_rows,
)
from toprl_models.policy import Decision, Policy, StageContext
from toprl_models.registry import BEFORE_LLM, register_method

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from toprl_models.schedule import Schedule


@register_method(
    "downsample", "Smaller image", "arXiv 2511.02650", stages=BEFORE_LLM, refuses=after_first_layers, inputs=("images",)
)
class Downsample(Policy):
    """Encode the same pictures at fewer patches and put these features in place of the visual tokens.

    The pixels that entered the tower are shrunk by antialiased bicubic interpolation to the largest size whose tokens
    are within the picture's share of the budget, ``num_keep * tokens // num_visual``: a square for the towers of fixed
    size (LLaVA-1.5, Video-LLaVA images and each tile of InternVL and SmolVLM), whose position embeddings are
    interpolated, the picture's own shape for towers of any size (Qwen, Pixtral; ``smaller_grid``). Where that number is
    not reached, fewer tokens stay: 13 x 13 = 169 of 192. A picture whose share is below one token vanishes; a row that
    keeps everything is left as it is.

    LLaVA-NeXT and LLaVA-OneVision see a picture as an overview and tiles. Its tiles are shrunk first, and packed by the
    model's own rule, beside the full overview; where not even tiles of one patch fit, the picture has the overview
    alone, with one newline feature as the model packs a picture of a single tile, and then that shrinks. (A smaller
    picture before the processor would not do: the processors scale every picture up to at least two tiles.)

    The new tokens sit in slots spread evenly over the picture (``spread``), in raster order. Positions are consecutive
    after the stage, as those of a smaller picture would be; only Qwen's M-RoPE positions stay those of the slots, so
    that the small picture covers the full one's area. Features that a decoder adds later (Qwen3-VL's deepstack) are
    those of the small picture.

    Deviations from resizing the picture file: pixels are already normalised and, for fixed-size towers, cropped; values
    are not rounded to 8 bits or clipped. The full pictures are encoded as well, because the model does so before this
    stage: it measures accuracy at a budget, not time.

    One instance serves one attached model at a time.

    Raises:
        ValueError: by ``attach``, for another schedule than one stage at layer 0, or a model whose pictures cannot be
            shrunk after its processor; in the forward pass, for videos and for pictures that were encoded ahead of
            time.
    """

    positions = "renumbered"
    uses_text = False

    def __init__(self) -> None:
        self._source: Source | None = None

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        check_before_llm(self, schedule)
        if reason := why_not(model):
            raise ValueError(f"model: Downsample does not apply: {reason}; resize images before the processor instead")

    def counts(self, schedule: Schedule, num_visual: int) -> tuple[int, ...]:
        """Count exactly for towers of fixed size once attached; before, and for others, as of one square picture."""
        (keep,) = schedule.counts(num_visual)
        if keep == num_visual:
            return (keep,)
        picture = (self._source.tokens if self._source else 0) or num_visual
        rows, columns = smaller_grid(math.isqrt(picture), math.isqrt(picture), keep * picture // num_visual)
        return (rows * columns * (num_visual // picture),)

    def hooks(self, model: PreTrainedModel) -> list[RemovableHandle]:
        self._recorder = Recorder(model.base_model)
        self._source = source_of(model)(model, self._recorder)
        return self._recorder.handles

    def decide(self, context: StageContext) -> Decision:
        """Score the slots that the new tokens take by 1, the others by 0."""
        refuse_videos(self, context.inputs)
        assert self._source is not None
        seen = self._recorder.take()
        lengths = self._source.lengths(seen)
        repeats, pictures = split_rows(lengths, context.num_visual)
        check_features(context, repeats, seen["features"])
        valid = context.valid_mask[::repeats]
        keep, whole = valid.clone(), context.hidden_states[::repeats]
        planes = seen.get("planes") or ()
        placed = [whole.clone(), *(torch.zeros_like(whole) for _ in planes)]
        for plane, features in zip(placed[1:], planes, strict=True):
            plane[valid] = features.to(plane.dtype)
        # the slot of each feature, picture by picture
        slots = valid.flatten().nonzero()[:, 0].split(lengths)
        budgets = {}
        for row, numbers in enumerate(pictures):
            wanted, present = context.num_keep[row * repeats], context.num_visual[row * repeats]
            budgets.update({n: wanted * lengths[n] // present for n in numbers if wanted < present})
        for number in budgets:
            keep.view(-1)[slots[number]] = False
        for small in self._source.shrink(seen, budgets):
            hosts = slots[small.number][small.places.to(keep.device)]
            keep.view(-1)[hosts] = True
            for states, features in zip(placed, (small.features, *small.planes), strict=True):
                states.view(-1, states.shape[-1])[hosts] = features.to(states.dtype)
        keep = keep.repeat_interleave(repeats, 0)
        states, *planes = (part.repeat_interleave(repeats, 0) for part in placed)
        return Decision(keep.float(), keep, states, tuple(planes))
