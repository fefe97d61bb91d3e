"""Strips: an image, then what is left of it after each stage, dropped tokens faded (the paper's Figure 4)."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from toprl_models.panels import Panel

OUTLINE = (38, 50, 56)
FADED = (244, 244, 242)  # what dropped patches fade towards
FADE = 0.86  # how far they go there
SCALE = 2  # pixels of a strip per pixel of the image
BLANK = (206, 212, 216)  # a picture that cannot be had from the model's arguments
WIDTH = 480  # pixels of a drawn stage, about
GAP = 6  # pixels between panels
LETTERS = 20  # pixels of the lettering of a PNG
STYLE = """
body { margin: 0 auto; max-width: 1100px; padding: 20px; color: #22282e; background: #fff;
       font: 15px/1.5 "Inter", "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 22px; line-height: 1.3; margin: 0 0 8px; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 10px 0 18px; }
dt { color: #626b74; } dd { margin: 0; overflow-wrap: anywhere; }
.strip { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 18px; }
figure { margin: 0; } img { width: 100%; height: auto; display: block; } figcaption { color: #626b74; }
"""


@dataclass(frozen=True)
class Drawing:
    """A column of a strip: the whole prompt, or what one stage kept."""

    title: str
    picture: Image.Image


def draw_stage(
    image: Image.Image, kept: Collection[int], side: int | tuple[int, int], scale: int = SCALE
) -> Image.Image:
    """Draw the image with dropped patches faded and the kept ones unchanged inside a thin outline.

    Args:
        image: RGB, its sides multiples of the number of patches along them.
        kept: raster indices of the kept patches, from 0.
        side: patches per side, or rows and columns of patches.
        scale: pixels drawn per pixel of the image, and width of the outline.

    Returns:
        The image ``scale`` times as large, plus a margin of ``scale`` pixels that holds the outline of patches at the
        border. The outline lies on the dropped side of an edge, so kept patches are exact.

    Raises:
        ValueError: an index out of range, or sides that are not multiples of ``side``.

    Example:
        >>> draw_stage(Image.new("RGB", (128, 128)), kept=[0, 9], side=8).size
        (260, 260)
    """
    rows, columns = (side, side) if isinstance(side, int) else side
    width, height = image.size
    if width % columns or height % rows:
        raise ValueError(f"image is {width}x{height}; its sides must be multiples of side={side}")
    if bad := [index for index in kept if not 0 <= index < rows * columns]:
        raise ValueError(f"kept={bad} must lie in 0..{rows * columns - 1}")
    mask = np.zeros((rows, columns), bool)
    mask.flat[list(kept)] = True
    mask = np.kron(mask, np.ones((height // rows * scale, width // columns * scale), bool))  # [H*scale, W*scale]
    mask = np.pad(mask, scale)
    pixels = np.asarray(image.convert("RGB")).repeat(scale, 0).repeat(scale, 1).astype(float)
    pixels = np.pad(pixels, ((scale, scale), (scale, scale), (0, 0)), constant_values=255)
    pixels[~mask] += FADE * (np.array(FADED) - pixels[~mask])
    near = mask.copy()  # within ``scale`` pixels of a kept patch, corners included
    for axis in (0, 1):
        near = np.logical_or.reduce([np.roll(near, shift, axis) for shift in range(-scale, scale + 1)])
    pixels[near & ~mask] = OUTLINE
    return Image.fromarray(pixels.round().astype(np.uint8))


def draw_panels(panels: Sequence[Panel], kept: Collection[int]) -> Image.Image:
    """Draw all panels of a prompt side by side, in rows that together are about square.

    Args:
        panels: from ``panels_of``.
        kept: raster numbers of the kept tokens in the prompt.
    """
    across = math.ceil(math.sqrt(len(panels)))
    lines = [panels[start : start + across] for start in range(0, len(panels), across)]
    widest = max(sum(panel.numbers.shape[1] for panel in line) for line in lines)
    cell = max(4, min(40, WIDTH // widest))
    drawn: list[list[Image.Image]] = []
    for line in lines:
        drawn.append([])
        for panel in line:
            rows, columns = panel.numbers.shape
            size = (columns * cell, rows * cell)
            picture = panel.picture.convert("RGB").resize(size) if panel.picture else Image.new("RGB", size, BLANK)
            inside = np.flatnonzero(np.isin(panel.numbers, list(kept)))
            drawn[-1].append(draw_stage(picture, inside.tolist(), (rows, columns), scale=1))
    sizes = [(sum(one.width + GAP for one in line) - GAP, max(one.height for one in line)) for line in drawn]
    whole = Image.new("RGB", (max(w for w, _ in sizes), sum(h + GAP for _, h in sizes) - GAP), "white")
    top = 0
    for pictures, (_, height) in zip(drawn, sizes, strict=True):
        left = 0
        for picture in pictures:
            whole.paste(picture, (left, top))
            left += picture.width + GAP
        top += height + GAP
    return whole


def strip(panels: Sequence[Panel], layers: Sequence[int], kept: Sequence[Collection[int]]) -> list[Drawing]:
    """Draw the whole prompt and what each stage kept.

    Args:
        panels: from ``panels_of``.
        layers: the decoder layer of each stage.
        kept: raster numbers that each stage kept; those of ``StageTrace.indices``.
    """
    everything = [number for panel in panels for number in (*panel.numbers.flatten().tolist(), *panel.others)]
    others = {number for panel in panels for number in panel.others}
    drawings = [Drawing(f"all {len(everything)} tokens", draw_panels(panels, everything))]
    for layer, numbers in zip(layers, kept, strict=True):
        apart = len(others & set(numbers))
        beside = f", {apart} of them newlines or class tokens" if apart else ""
        title = f"before layer {layer}: {len(numbers)} kept{beside}"
        drawings.append(Drawing(title, draw_panels(panels, numbers)))
    return drawings


def remark(panels: Sequence[Panel]) -> str:
    """Say what a reader of the strip must know about the panels; "" for nothing."""
    names = f"Panels: {', '.join(panel.name for panel in panels)}." if len(panels) > 1 else ""
    unknown = [panel.name for panel in panels if not panel.placed]
    if unknown:
        names += f" The places of the tokens of {', '.join(unknown)} are unknown: they are in reading order."
    if any(panel.picture is None for panel in panels):
        names += " Grey: the picture cannot be had from the model's arguments."
    return names.strip()


def png_uri(image: Image.Image) -> str:
    """Encode an image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def strip_png(drawings: Sequence[Drawing]) -> Image.Image:
    """Lay the drawings side by side, each under its title."""
    font = ImageFont.load_default(LETTERS)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widths = [max(one.picture.width, math.ceil(ruler.textlength(one.title, font))) for one in drawings]
    height = max(one.picture.height for one in drawings)
    space = 3 * GAP
    page = Image.new("RGB", (sum(widths) + space * (len(widths) + 1), height + LETTERS + 3 * space), "white")
    pen, left = ImageDraw.Draw(page), space
    for one, width in zip(drawings, widths, strict=True):
        pen.text((left, space), one.title, OUTLINE, font)
        page.paste(one.picture, (left, 2 * space + LETTERS))
        left += width + space
    return page


def strip_html(title: str, facts: Sequence[tuple[str, str]], drawings: Sequence[Drawing], note: str = "") -> str:
    """Make a page of a strip that needs no other file and is readable on a phone.

    Args:
        title: heading.
        facts: names and values above the strip.
        drawings: from ``strip``.
        note: a paragraph below.
    """
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    figures = "".join(
        f'<figure><img alt="{escape(one.title)}" src="{png_uri(one.picture)}">'
        f"<figcaption>{escape(one.title)}</figcaption></figure>\n"
        for one in drawings
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<dl>{terms}</dl>\n<div class="strip">\n{figures}</div>\n<p>{escape(note)}</p>\n</body></html>\n'
    )
