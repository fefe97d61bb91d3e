"""The plain smaller image: the control that a pruning method has to beat (arXiv 2511.02650, 2512.07580)."""

from __future__ import annotations

import inspect
import math
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from toprl_models.families import Family, family_of
from toprl_models.methods._tower import (
    Recorder,
    after_first_layers,
    check_before_llm,
    check_features,
    no_image_tower,
    refuse_videos,
    split_rows,
)
from toprl_models.policy import Decision, Policy, StageContext
from toprl_models.registry import BEFORE_LLM, register_method

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from toprl_models.schedule import Schedule


def smaller_grid(height: int, width: int, budget: int) -> tuple[int, int]:
    """Find the largest grid of at most ``budget`` tokens in the shape of ``height`` x ``width``.

    The longer side is any whole number up to its full length, and the other side follows, rounded up or down but not
    below 1; a square's grid is a square; (0, 0) for no budget.

    Example:
        >>> smaller_grid(24, 24, 192), smaller_grid(20, 30, 100)
        ((13, 13), (8, 12))
    """
    if height > width:
        columns, rows = smaller_grid(width, height, budget)
        return rows, columns
    best = (0, 0)
    for columns in range(1, width + 1):
        for rows in (max(1, columns * height // width), -(-columns * height // width)):
            if best[0] * best[1] < rows * columns <= budget:
                best = (rows, columns)
    return best


def spread(size: tuple[int, int], small: tuple[int, int]) -> Tensor:
    """Number, ascending, the cells of a grid of ``size`` into which the centres of ``small``'s cells fall."""
    rows, columns = ((2 * torch.arange(few) + 1) * many // (2 * few) for many, few in zip(size, small, strict=True))
    return (rows[:, None] * size[1] + columns).flatten()


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize pictures ``[n, C, H, W]``: antialiased bicubic, computed in float32."""
    return interpolate(pixels.float(), size=(height, width), mode="bicubic", antialias=True).to(pixels.dtype)


def from_patches(patches: Tensor, grid: tuple[int, int, int], merge: int, frames: int, side: int) -> Tensor:
    """Put together the picture [t * frames, C, h * side, w * side] that Qwen's processor cut into ``patches``.

    Args:
        patches: ``[t * h * w, C * frames * side * side]``, block after block of ``merge`` x ``merge`` patches.
        grid: t, h, w in patches.
        merge: side of a block in patches.
        frames: frames of a patch.
        side: side of a patch in pixels.
    """
    t, h, w = grid
    blocks = patches.view(t, h // merge, w // merge, merge, merge, -1, frames, side, side)
    return blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t * frames, -1, h * side, w * side)


def to_patches(picture: Tensor, merge: int, frames: int, side: int) -> Tensor:
    """Cut a picture into patches: the inverse of ``from_patches``."""
    channels, height, width = picture.shape[1:]
    down, across = height // (merge * side), width // (merge * side)
    blocks = picture.view(-1, frames, channels, down, merge, side, across, merge, side)
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, channels * frames * side * side)


def not_smaller(family: Family) -> str:
    """Say why the images of a family cannot be shrunk after its processor; "" where they can."""
    if family.tiles:
        return "the number of tiles follows the picture"
    return no_image_tower(family)


def is_cut_by_processor(tower: PreTrainedModel) -> bool:
    """Tell whether the tower takes images of any size, as patches that the processor cut (Qwen)."""
    return hasattr(tower.config, "spatial_merge_size") and hasattr(tower.config, "temporal_patch_size")


def why_not(model: PreTrainedModel) -> str:
    """Say why the images of ``model`` cannot be shrunk after its processor; "" where they can."""
    family = family_of(model)
    if reason := not_smaller(family):
        return reason
    tower = getattr(model.base_model, family.image_tower, None)
    if tower is None:
        return f"{type(model).__name__} has no {family.image_tower}"
    if is_cut_by_processor(tower):
        return ""
    embeddings = getattr(tower, "embeddings", None)
    patches = getattr(embeddings, "patch_embeddings", embeddings)
    if not (hasattr(embeddings, "interpolate_pos_encoding") and hasattr(patches, "num_patches")):
        return f"the vision tower ({type(tower).__name__}) cannot interpolate its position embeddings"
    has_class_token = hasattr(embeddings, "class_embedding") or hasattr(embeddings, "cls_token")
    if has_class_token != (getattr(model.config, "vision_feature_select_strategy", None) == "default"):
        return "config.vision_feature_select_strategy must drop the class token and nothing else"
    if not hasattr(model.base_model, "multi_modal_projector"):
        return f"{type(model).__name__} has no multi_modal_projector"
    return ""


class _Tiles:
    """Pictures for a tower of fixed size, whose tokens are a square of ``tokens`` in all."""

    def __init__(self, base: PreTrainedModel, tower: PreTrainedModel, recorder: Recorder) -> None:
        self._base = weakref.ref(base)
        embeddings = tower.embeddings
        patches = getattr(embeddings, "patch_embeddings", embeddings).num_patches
        self.tokens = int(patches * getattr(base.config, "downsample_ratio", 1) ** 2)
        known = inspect.signature(tower.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in known else {}
        recorder.input_of(tower, "pixels", lambda args, kwargs: args[0] if args else kwargs["pixel_values"])
        recorder.output_of(base.multi_modal_projector, "features", lambda features: features.flatten(0, 1))

    def grids(self, seen: dict[str, Any]) -> list[tuple[int, int]]:
        side = math.isqrt(self.tokens)
        return [(side, side)] * len(seen["pixels"])

    def encode(self, seen: dict[str, Any], numbers: list[int], small: tuple[int, int]) -> list[Sequence[Tensor]]:
        """Return the pictures' features, and for Qwen3-VL those that are added later, plane by plane."""
        base: PreTrainedModel = self._base()
        unit = seen["pixels"].shape[-1] // math.isqrt(self.tokens)  # pixels along a token
        pixels = resized(seen["pixels"][numbers], small[0] * unit, small[1] * unit)
        return [base.get_image_features(pixels, return_dict=True, **self._options).pooler_output]


class _Patches:
    """Pictures of any size, cut into patches by Qwen's processor."""

    tokens = 0  # not fixed

    def __init__(self, base: PreTrainedModel, tower: PreTrainedModel, recorder: Recorder) -> None:
        self._base, config = weakref.ref(base), tower.config
        self._merge, self._side, self._frames = config.spatial_merge_size, config.patch_size, config.temporal_patch_size
        recorder.input_of(tower, "pixels", lambda args, kwargs: args[0])
        recorder.input_of(tower, "grid", lambda args, kwargs: kwargs["grid_thw"].tolist())
        recorder.output_of(tower, "features", lambda output: output.pooler_output)
        recorder.output_of(tower, "planes", lambda output: getattr(output, "deepstack_features", None) or ())

    def grids(self, seen: dict[str, Any]) -> list[tuple[int, int]]:
        return [(height // self._merge, width // self._merge) for _, height, width in seen["grid"]]

    def encode(self, seen: dict[str, Any], numbers: list[int], small: tuple[int, int]) -> list[Sequence[Tensor]]:
        base: PreTrainedModel = self._base()
        pictures = seen["pixels"].split([math.prod(grid) for grid in seen["grid"]])
        unit = self._merge * self._side  # pixels along a token
        patches = []
        for number in numbers:
            picture = from_patches(pictures[number], seen["grid"][number], self._merge, self._frames, self._side)
            picture = resized(picture, small[0] * unit, small[1] * unit)
            patches.append(to_patches(picture, self._merge, self._frames, self._side))
        grid = torch.tensor([[1, small[0] * self._merge, small[1] * self._merge]] * len(numbers))
        grid = grid.to(seen["pixels"].device)
        output = base.get_image_features(torch.cat(patches), grid, return_dict=True)
        return [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]


@register_method(
    "downsample",
    "Smaller image",
    "arXiv 2511.02650",
    stages=BEFORE_LLM,
    refuses=lambda family: after_first_layers(family) or not_smaller(family),
)
class Downsample(Policy):
    """Encode the same pictures at fewer patches and put these features in place of the visual tokens.

    The pixels that entered the tower are shrunk by antialiased bicubic interpolation to the largest size whose tokens
    are within the picture's share of the budget, ``num_keep * tokens // num_visual``: a square for the towers of fixed
    size (LLaVA-1.5, Video-LLaVA images and each tile of InternVL, whose position embeddings are interpolated), the
    picture's own shape for Qwen-VL (``smaller_grid``). Where that number is not reached, fewer tokens stay: 13 x 13
    = 169 of 192. A picture whose share is below one token vanishes; a row that keeps everything is left as it is.

    The new tokens sit in slots spread evenly over the picture (``spread``), in raster order. Positions are consecutive
    after the stage, as those of a smaller picture would be; only Qwen's M-RoPE positions stay those of the slots, so
    that the small picture covers the full one's area. The features that Qwen3-VL adds between its layers are the small
    picture's, too.

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
        self._source: _Tiles | _Patches | None = None

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        check_before_llm(self, schedule)
        reason = why_not(model)
        if reason:
            raise ValueError(f"model: Downsample does not apply: {reason}; resize images before the processor instead")

    def counts(self, schedule: Schedule, num_visual: int) -> tuple[int, ...]:
        """Count exactly for towers of fixed size once attached; before, and for Qwen, as of one square picture."""
        (keep,) = schedule.counts(num_visual)
        if keep == num_visual:
            return (keep,)
        picture = (self._source.tokens if self._source else 0) or num_visual
        rows, columns = smaller_grid(math.isqrt(picture), math.isqrt(picture), keep * picture // num_visual)
        return (rows * columns * (num_visual // picture),)

    def hooks(self, model: PreTrainedModel) -> list[RemovableHandle]:
        tower = getattr(model.base_model, family_of(model).image_tower)
        self._recorder = Recorder(model.base_model)
        source = _Patches if is_cut_by_processor(tower) else _Tiles
        self._source = source(model.base_model, tower, self._recorder)
        return self._recorder.handles

    def decide(self, context: StageContext) -> Decision:
        """Score the slots that the new tokens take by 1, the others by 0."""
        refuse_videos(self, context.inputs)
        assert self._source is not None
        seen = self._recorder.take()
        grids = self._source.grids(seen)
        lengths = [rows * columns for rows, columns in grids]
        repeats, pictures = split_rows(lengths, context.num_visual)
        check_features(context, repeats, seen["features"])
        valid = context.valid_mask[::repeats]
        keep, whole = valid.clone(), context.hidden_states[::repeats]
        placed = [whole.clone(), *(torch.zeros_like(whole) for _ in seen.get("planes", ()))]
        for plane, features in zip(placed[1:], seen.get("planes", ()), strict=True):
            plane[valid] = features.to(plane.dtype)
        # the slot of each feature, picture by picture
        slots = valid.flatten().nonzero()[:, 0].split(lengths)
        alike = defaultdict(list)
        for row, numbers in enumerate(pictures):
            wanted, present = context.num_keep[row * repeats], context.num_visual[row * repeats]
            for number in numbers if wanted < present else []:
                keep.view(-1)[slots[number]] = False
                alike[smaller_grid(*grids[number], wanted * lengths[number] // present)].append(number)
        alike.pop((0, 0), None)
        for small, group in alike.items():
            for number, *parts in zip(group, *self._source.encode(seen, group, small), strict=True):
                hosts = slots[number][spread(grids[number], small).to(keep.device)]
                keep.view(-1)[hosts] = True
                for states, features in zip(placed, parts, strict=True):
                    states.view(-1, states.shape[-1])[hosts] = features.to(states.dtype)
        keep = keep.repeat_interleave(repeats, 0)
        states, *planes = (part.repeat_interleave(repeats, 0) for part in placed)
        return Decision(keep.float(), keep, states, tuple(planes))
