"""Places of visual tokens: the grid of each image, tile or frame that the raster numbers of a prompt fill.

Read from the model's arguments alone: tables of grids (``image_grid_thw``, ``spatial_shapes``, ``image_sizes``, ...),
stacks of tiles and frames (``pixel_values``), and the runs of placeholders in ``input_ids``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from toprl_models.families import family_of, placeholder_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_CELL = 64  # grid units of a table per token, along a side


@dataclass(frozen=True)
class Panel:
    """A picture as a grid of visual tokens.

    Attributes:
        name: "image 1", "image 1, overview", "tile 3", "frame 2", ...
        numbers: int64 ``[rows, columns]``, the raster number in the prompt of the token in each cell.
        others: raster numbers of tokens that belong to the picture but cover no part of it: newlines, class tokens.
        picture: what the grid covers; None where it cannot be told from the arguments.
        placed: False where the grid only lists the tokens in reading order, because their places are unknown.
    """

    name: str
    numbers: np.ndarray
    others: tuple[int, ...] = ()
    picture: Image.Image | None = None
    placed: bool = True


@dataclass(frozen=True)
class _Grid:
    """Tokens of one picture: ``before`` the grid, at the end of each row (``row_end``), and ``after`` the grid."""

    rows: int
    columns: int
    before: int = 0
    row_end: int = 0
    after: int = 0
    name: str = ""
    picture: Image.Image | None = None

    @property
    def size(self) -> int:
        return self.before + self.rows * (self.columns + self.row_end) + self.after


def panels_of(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    images: Sequence[Image.Image] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> list[Panel]:
    """Lay out the visual tokens of one prompt.

    Args:
        model: of any supported class.
        inputs: the model's arguments for one prompt, as its processor made them.
        images: the images that the processor was given, for families whose grid covers the whole image.
        mean, std: of the processor's normalisation, to show tiles in their colours; by default the range of values of
            a tile becomes the range of its colours.

    Returns:
        Panels whose ``numbers`` and ``others`` hold each raster number of the prompt once, in ascending order.

    Raises:
        ValueError: ``inputs`` hold several prompts, no ``input_ids``, or no visual token.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else ids
        raise ValueError(f"inputs: input_ids is {shape}, but panels are those of one prompt: give int64 [1, N]")
    image_ids, video_ids = placeholder_ids(model, family_of(model))
    shared = set(image_ids) == set(video_ids) and inputs.get("pixel_values_videos") is not None
    kinds = {"video": video_ids} if shared else {"image": image_ids, "video": video_ids}
    tokens = ids[0].tolist()
    numbers: dict[str, list[tuple[int, int]]] = {}
    visual = {number for members in kinds.values() for number in members}
    slots = [slot for slot, token in enumerate(tokens) if token in visual]
    if not slots:
        raise ValueError("inputs: the prompt has no visual token; give it an image")
    for raster, slot in enumerate(slots):
        kind = next(name for name, members in kinds.items() if tokens[slot] in members)
        numbers.setdefault(kind, []).append((raster, slot))
    found: list[Panel] = []
    for kind, places in numbers.items():
        lengths = _runs([slot for _, slot in places])
        values = _Values(inputs, kind, mean, std)
        grids, placed = _grids(model, inputs, kind, lengths, values, images)
        found += list(_filled(grids, [raster for raster, _ in places], placed))
    return sorted(found, key=lambda panel: panel.numbers.min())


def _runs(slots: Sequence[int]) -> list[int]:
    """Lengths of the runs of neighbours among ascending ``slots``."""
    cuts = [0, *(place for place in range(1, len(slots)) if slots[place] != slots[place - 1] + 1), len(slots)]
    return [stop - start for start, stop in itertools.pairwise(cuts)]


def _filled(grids: Sequence[_Grid], raster: Sequence[int], placed: bool) -> Iterator[Panel]:
    """Give the grids their raster numbers, in order."""
    start = 0
    for grid in grids:
        mine = np.array(raster[start : start + grid.size], np.int64)
        inner = mine[grid.before : grid.size - grid.after].reshape(grid.rows, grid.columns + grid.row_end)
        cells = inner[:, : grid.columns]
        others = tuple(sorted(set(mine.tolist()) - set(cells.flatten().tolist())))
        yield Panel(grid.name, cells, others, grid.picture, placed)
        start += grid.size


def _grids(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    kind: str,
    lengths: Sequence[int],
    values: _Values,
    images: Sequence[Image.Image],
) -> tuple[list[_Grid], bool]:
    """Find the grids of all images, or of all videos; and whether they are places in the picture."""
    total = sum(lengths)
    found = None
    if kind == "image" and hasattr(model.base_model, "pack_image_features"):
        found = _anyres(model, inputs, lengths, values, images)
    for name, sizes in ({} if found else _tables(inputs, kind)).items():
        found = found or _of_table(sizes, total, kind, name, images, values)
    found = found or _of_tiles(total, kind, values, images)
    if found and sum(grid.size for grid in found) == total:
        return found, True
    flat = [max(side for side in range(1, math.isqrt(length) + 1) if length % side == 0) for length in lengths]
    pairs = zip(flat, lengths, strict=True)
    return [_Grid(rows, n // rows, name=f"{kind} {i + 1}") for i, (rows, n) in enumerate(pairs)], False


def _tables(inputs: Mapping[str, Any], kind: str) -> dict[str, list[tuple[int, ...]]]:
    """Find the arguments that list a grid for each picture: frames, rows and columns, or rows and columns."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.is_floating_point() or ("video" in name) != (kind == "video"):
            continue
        if value.ndim == 3 and name.endswith("position_ids") and value.shape[-1] == 2:  # columns and rows of patches
            found[name] = [tuple((one.amax(0) + 1).flip(0).tolist()) for one in value]
        elif value.ndim == 2 and value.shape[1] in (2, 3) and any(part in name for part in ("grid", "size", "shape")):
            found[name] = [tuple(row) for row in value.tolist()]
    return found


def _of_table(
    sizes: list[tuple[int, ...]],
    total: int,
    kind: str,
    name: str,
    images: Sequence[Image.Image],
    values: _Values,
) -> list[_Grid] | None:
    """Find how many units of the table a token spans: the smallest number by which the tokens add up."""
    for unit in range(1, LARGEST_CELL + 1):
        if any(rows % unit or columns % unit for *_, rows, columns in sizes):
            continue
        if sum(math.prod(frames) * (rows // unit) * (columns // unit) for *frames, rows, columns in sizes) == total:
            break
    else:
        return None
    whole = kind == "image" and len(images) == len(sizes)
    drawn = None if whole or "thw" not in name else values.patches(sizes, unit)
    grids: list[_Grid] = []
    for number, (*frames, rows, columns) in enumerate(sizes):
        for frame in range(math.prod(frames)):
            picture = images[number] if whole else drawn[len(grids)] if drawn else None
            label = f"{kind} {number + 1}" + (f", frame {frame + 1}" if math.prod(frames) > 1 else "")
            grids.append(_Grid(rows // unit, columns // unit, name=label, picture=picture))
    return grids


def _of_tiles(total: int, kind: str, values: _Values, images: Sequence[Image.Image]) -> list[_Grid] | None:
    """Divide the tokens evenly among tiles or frames, each with a class token before, or one newline after all."""
    tiles = values.tiles()
    if not tiles:
        return None
    word = "frame" if kind == "video" else "image" if len(tiles) in (1, len(images)) else "tile"
    for before, after in ((0, 0), (1, 0), (0, 1)):
        each, rest = divmod(total - after, len(tiles))
        height, width = tiles[0].shape[-2:]
        sides = [
            n for n in range(1, each + 1) if (each - before) % n == 0 and n * n * width == (each - before) * height
        ]
        if rest or not sides:
            continue
        rows, columns = sides[0], (each - before) // sides[0]
        last = len(tiles) - 1
        return [
            _Grid(rows, columns, before, after=after * (i == last), name=f"{word} {i + 1}", picture=values.image(tile))
            for i, tile in enumerate(tiles)
        ]
    return None


def _anyres(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    lengths: Sequence[int],
    values: _Values,
    images: Sequence[Image.Image],
) -> list[_Grid] | None:
    """Find the overview of each image and its unpadded tiles, whose rows end in a newline (LLaVA-NeXT and its kin)."""
    sizes, pixels = inputs.get("image_sizes"), inputs.get("pixel_values")
    vision = model.config.vision_config
    if sizes is None or pixels is None or pixels.ndim != 5 or len(sizes) != len(lengths):
        return None
    side = vision.image_size // vision.patch_size
    grids: list[_Grid] = []
    for number, ((height, width), length) in enumerate(zip(sizes.tolist(), lengths, strict=True)):
        label, overview, rest = f"image {number + 1}", values.image(pixels[number, 0]), length - side * side
        if rest == 1:
            grids.append(_Grid(side, side, after=1, name=label, picture=overview))
            continue
        pairs = [(rows, rest // rows - 1) for rows in range(1, rest // 2 + 1) if rest % rows == 0]
        if not pairs:
            return None
        # unpadding leaves the image's own shape, up to rounding
        rows, columns = min(pairs, key=lambda pair: abs(math.log(pair[0] / pair[1] * width / height)))
        grids.append(_Grid(side, side, name=f"{label}, overview", picture=overview))
        whole = images[number] if len(images) == len(lengths) else None
        grids.append(_Grid(rows, columns, row_end=1, name=f"{label}, tiles", picture=whole))
    return grids


class _Values:
    """Pixels among the model's arguments, of images or of videos."""

    def __init__(
        self,
        inputs: Mapping[str, Any],
        kind: str,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        names = ("pixel_values_videos",) if kind == "video" else ("pixel_values", "pixel_values_images")
        self.values = next((inputs[name] for name in names if isinstance(inputs.get(name), Tensor)), None)
        self.mean, self.std = mean, std

    def tiles(self) -> list[Tensor]:
        """List the tiles or frames ``[3, H, W]``, where the pixels are a stack of them."""
        if self.values is None or self.values.ndim not in (4, 5) or self.values.shape[-3] != 3:
            return []
        return list(self.values.flatten(0, -4))

    def patches(self, sizes: list[tuple[int, ...]], merge: int) -> list[Image.Image] | None:
        """Put patches together that were flattened in groups of ``merge`` x ``merge`` (Qwen and its kin)."""
        if self.values is None or self.values.ndim != 2:
            return None
        drawn, start = [], 0
        for frames, rows, columns in sizes:
            area = self.values[start : start + frames * rows * columns].float()
            start += frames * rows * columns
            length = next(n for n in (2, 1) if math.isqrt(area.shape[1] // (3 * n)) ** 2 * 3 * n == area.shape[1])
            side = math.isqrt(area.shape[1] // (3 * length))
            blocks = area.view(frames, rows // merge, columns // merge, merge, merge, 3, length, side, side)
            still = blocks[:, :, :, :, :, :, 0]  # the first of the images that a patch spans in time
            still = still.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(frames, 3, rows * side, columns * side)
            drawn += [self.image(frame) for frame in still]
        return drawn

    def image(self, tile: Tensor) -> Image.Image:
        """Undo the normalisation of ``tile`` [3, H, W]."""
        tile = tile.detach().float().cpu()
        if self.mean is not None and self.std is not None:
            shaped = [torch.tensor(part).view(3, 1, 1) for part in (self.std, self.mean)]
            tile = tile * shaped[0] + shaped[1]
        else:
            low, high = tile.aminmax()
            tile = (tile - low) / (high - low).clamp(min=1e-6)
        return Image.fromarray((tile.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
