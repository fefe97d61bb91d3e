"""Smaller versions of the pictures that entered a vision tower, and the features that the model makes of them."""

from __future__ import annotations

import inspect
import math
import sys
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from toprl_models.methods._layout import (
    image_tower,
    layout_of,
    projector_of,
    takes_grids,
)
from toprl_models.methods._tower import PackingWatch, Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


class Small(NamedTuple):
    """A picture made smaller.

    Attributes:
        number: of the picture.
        places: int64 ``[n]``, the picture's slots that its new tokens take, ascending.
        features: ``[n, d]``.
        planes: features that the decoder adds later, ``[n, d]`` each.
    """

    number: int
    places: Tensor
    features: Tensor
    planes: Sequence[Tensor] = ()


class Source:
    """Pictures of one kind of tower, which are recorded when they enter it and may be encoded once more."""

    tokens = 0  # of a picture, where all have as many

    def __init__(self, model: PreTrainedModel, recorder: Recorder) -> None:
        tower, projector = image_tower(model), projector_of(model)
        # a detached policy must not keep the model alive
        self._model, self._recorder = weakref.ref(model), weakref.ref(recorder)
        self._layout = layout_of(model)
        signature = inspect.signature(tower.forward)
        recorder.input_of(tower, "given", lambda args, kwargs: signature.bind(*args, **kwargs).arguments)
        if projector is None:
            recorder.output_of(tower, "features", lambda output: output.pooler_output)
            recorder.output_of(tower, "planes", lambda output: getattr(output, "deepstack_features", None))
        else:
            recorder.output_of(projector, "features", lambda features: features.flatten(0, -2), after=tower)

    @property
    def model(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None
        return model

    def grids(self, seen: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Return height and width in tokens of each picture."""
        given, merge = seen["given"], self._layout.merge
        pixels = given.get("pixel_values")
        grids = self._layout.grids({**given, "pixel_values": None if pixels is None else pixels.shape})
        return [(height // merge, width // merge) for height, width in grids]

    def lengths(self, seen: Mapping[str, Any]) -> list[int]:
        """Count the visual tokens of each picture."""
        return [height * width for height, width in self.grids(seen)]

    def shrink(self, seen: Mapping[str, Any], budgets: Mapping[int, int]) -> Iterator[Small]:
        """Encode the pictures with these numbers at no more tokens than their budgets."""
        grids, alike = self.grids(seen), defaultdict(list)
        for number, budget in budgets.items():
            alike[smaller_grid(*grids[number], budget)].append(number)
        alike.pop((0, 0), None)
        for (rows, columns), numbers in alike.items():
            down, across = self._layout.patch_size
            size = rows * self._layout.merge * down, columns * self._layout.merge * across
            again = self._encode(seen["given"], numbers, size)
            features, planes = again["features"], again.get("planes") or ()
            parts = zip(*(tensor.chunk(len(numbers)) for tensor in (features, *planes)), strict=True)
            for number, (one, *others) in zip(numbers, parts, strict=True):
                yield Small(number, spread(grids[number], (rows, columns)), one, others)

    def _encode(self, given: Mapping[str, Any], numbers: list[int], size: tuple[int, int]) -> dict[str, Any]:
        """Run the model's own encoder on the pictures with these numbers at ``size`` in pixels; return what it made."""
        self.model.base_model.get_image_features(**self.arguments(given, numbers, size), return_dict=True)
        recorder = self._recorder()
        assert recorder is not None
        return recorder.take()

    def arguments(self, given: Mapping[str, Any], numbers: list[int], size: tuple[int, int]) -> dict[str, Any]:
        """Return the arguments of ``get_image_features`` for these pictures."""
        raise NotImplementedError


class FixedSize(Source):
    """Pictures and tiles of one size, for a tower that can interpolate its position embeddings."""

    def __init__(self, model: PreTrainedModel, recorder: Recorder) -> None:
        super().__init__(model, recorder)
        tower, size = image_tower(model), image_tower(model).config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        down, across = (side * self._layout.merge for side in self._layout.patch_size)
        self.tokens = height // down * (width // across)
        known = inspect.signature(tower.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in known else {}
        # its first axis are the rows of the batch
        self._by_rows = "pixel_attention_mask" in inspect.signature(model.base_model.get_image_features).parameters
        first = next(iter(inspect.signature(model.base_model.get_image_features).parameters))
        self._name = first

    def arguments(self, given: Mapping[str, Any], numbers: list[int], size: tuple[int, int]) -> dict[str, Any]:
        pixels = resized(given["pixel_values"][numbers], *size)
        return {self._name: pixels[None] if self._by_rows else pixels, **self._options}


class AnySize(Source):
    """Pictures of any size, side by side in a padded batch (Pixtral)."""

    def arguments(self, given: Mapping[str, Any], numbers: list[int], size: tuple[int, int]) -> dict[str, Any]:
        pixels, sizes = given["pixel_values"], given.get("image_sizes")
        pictures = []
        for number in numbers:
            height, width = pixels.shape[2:] if sizes is None else map(int, sizes[number])
            pictures.append(resized(pixels[number : number + 1, :, :height, :width], *size))
        return {
            "pixel_values": torch.cat(pictures),
            "image_sizes": torch.tensor([size] * len(numbers), device=pixels.device),
        }


class Patches(Source):
    """Pictures of any size, cut into patches by Qwen's processor, or row by row by that of PaddleOCR-VL."""

    def __init__(self, model: PreTrainedModel, recorder: Recorder) -> None:
        super().__init__(model, recorder)
        self._frames = getattr(image_tower(model).config, "temporal_patch_size", 1)

    def arguments(self, given: Mapping[str, Any], numbers: list[int], size: tuple[int, int]) -> dict[str, Any]:
        grids, (side, _) = given["grid_thw"].tolist(), self._layout.patch_size
        merge = self._layout.merge if self._layout.by_blocks else 1
        values = given["hidden_states"] if "hidden_states" in given else given["pixel_values"][0]  # a batch of one
        pictures = values.flatten(1).split([math.prod(grid) for grid in grids])
        patches = []
        for number in numbers:
            picture = from_patches(pictures[number], grids[number], merge, self._frames, side)
            patches.append(to_patches(resized(picture, *size), merge, self._frames, side))
        grid = torch.tensor([[1, size[0] // side, size[1] // side]] * len(numbers))
        pixels = torch.cat(patches).unflatten(1, values.shape[1:])
        return {"pixel_values": pixels, "image_grid_thw": grid.to(given["grid_thw"].device)}


class Tiled(Source):
    """Pictures as an overview and tiles, packed row by row with newline features (LLaVA-NeXT, LLaVA-OneVision)."""

    def __init__(self, model: PreTrainedModel, recorder: Recorder) -> None:
        super().__init__(model, recorder)
        recorder.handles.append(PackingWatch(model.base_model, recorder))
        self._side = model.config.vision_config.image_size // self._layout.patch_size[0]

    def lengths(self, seen: Mapping[str, Any]) -> list[int]:
        return [len(picture) for picture in seen["packed"]]

    def shrink(self, seen: Mapping[str, Any], budgets: Mapping[int, int]) -> Iterator[Small]:
        starts = [sum(seen["tiles"][:number]) for number in range(len(seen["tiles"]))]
        for number, budget in budgets.items():
            tiles = seen["given"]["pixel_values"][starts[number] : starts[number] + seen["tiles"][number]]
            full = seen["packed"][number]
            features = self._smaller(tiles, full, budget, seen["packing"], number)
            if len(features):
                yield Small(number, spread((1, len(full)), (1, len(features))), features)

    def _smaller(self, tiles: Tensor, full: Tensor, budget: int, packing: dict[str, Any], number: int) -> Tensor:
        """Return at most ``budget`` features ``[n, d]`` of a picture with these ``tiles``, which has ``full``."""
        overview = self._side**2
        for side in range(self._side - 1, 0, -1) if len(tiles) > 1 and budget > overview else ():
            count = len(self._pack(full.new_zeros(len(tiles), side**2, 1), full.new_zeros(1), side, packing, number))
            if overview + count - side**2 <= budget:
                features = self._features(tiles, side)
                packed = self._pack(features, packing["image_newline"], side, packing, number)
                return torch.cat([full[:overview], packed[side**2 :].to(full)])
        side = min(self._side, math.isqrt(max(budget - 1, 0)))
        if not side:
            return full[:0]
        newline = packing["image_newline"].to(full)[None]
        features = full[:overview] if side == self._side else self._features(tiles[:1], side)[0].to(full)
        return torch.cat([features, newline])

    def _features(self, tiles: Tensor, side: int) -> Tensor:
        """Encode ``tiles`` at ``side`` x ``side`` patches: ``[tiles, side * side, d]``."""
        model, (down, across) = self.model, self._layout.patch_size
        tower, projector, selected = image_tower(model), projector_of(model), model.config.vision_feature_layer
        pixels = resized(tiles, side * down, side * across)
        states = tower(pixels, interpolate_pos_encoding=True, output_hidden_states=True, return_dict=True).hidden_states
        layers, first = [selected] if isinstance(selected, int) else selected, int(self._layout.has_class_token)
        assert projector is not None
        features = projector(torch.cat([states[layer][:, first:] for layer in layers], -1))
        recorder = self._recorder()
        assert recorder is not None
        recorder.take()
        return features

    def _pack(self, values: Tensor, newline: Tensor, side: int, packing: dict[str, Any], number: int) -> Tensor:
        """Pack ``values`` ``[tiles, side * side, c]`` of a picture by the model's rule, for tiles of that ``side``."""
        base, patch, size = self.model.base_model, self._layout.patch_size[0], packing["image_sizes"][number]
        shape = sys.modules[type(base).__module__].get_anyres_image_grid_shape
        full = base.config.vision_config.image_size
        rows, columns = shape(size, base.config.image_grid_pinpoints, full)
        tile = side * patch
        config = SimpleNamespace(
            vision_config=SimpleNamespace(image_size=tile, patch_size=patch),
            image_grid_pinpoints=[[rows * tile, columns * tile]],
        )
        arguments = packing | {"image_features": [values], "image_sizes": [size], "image_newline": newline}
        return type(base).pack_image_features(SimpleNamespace(config=config), **arguments)[0][0]


def source_of(model: PreTrainedModel) -> type[Source]:
    """Choose how the pictures of ``model`` are made smaller."""
    tower = image_tower(model)
    if takes_grids(tower):
        return Patches
    if "image_sizes" in inspect.signature(tower.forward).parameters:
        return AnySize
    return Tiled if hasattr(model.base_model, "pack_image_features") else FixedSize


def why_not(model: PreTrainedModel) -> str:
    """Say why the images of ``model`` cannot be shrunk after its processor; "" where they can."""
    try:
        tower = image_tower(model)
        layout_of(model)
        projector = projector_of(model)
    except ValueError as error:
        return str(error).removeprefix("model: ")
    if issubclass(source_of(model), (Patches, AnySize)):
        return ""
    embeddings = getattr(tower, "embeddings", None)
    takes_any = "patch_attention_mask" in inspect.signature(tower.forward).parameters  # finds positions for any size
    if not takes_any and not hasattr(embeddings, "interpolate_pos_encoding"):
        return f"the vision tower ({type(tower).__name__}) cannot interpolate its position embeddings"
    if hasattr(projector, "patches_per_image"):
        return f"{type(projector).__name__} pools a picture of one size alone"
    return ""
