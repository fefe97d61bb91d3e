"""Placeholders of pruned images: how a prompt is shortened, and where its tokens were. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# a position is sent in digits that every floating dtype holds exactly: bfloat16 has 8 bits
BASE = 256
DIGITS = 2
AXES = 3  # time, height, width; three times the same where positions count tokens


class Gap(NamedTuple):
    """An image in a shortened prompt: its placeholders begin at ``start``, ``kept`` of them out of ``total``."""

    start: int
    kept: int
    total: int


def shorten(is_placeholder: Sequence[bool], kept: int) -> list[int]:
    """Pick the tokens of an image's text that stay when it keeps ``kept`` placeholders, one run of which it has.

    Raises:
        ValueError: the placeholders are no run: the image is cut into parts with text between them.
    """
    places = [place for place, flag in enumerate(is_placeholder) if flag]
    if places and places[-1] - places[0] + 1 != len(places):
        raise ValueError(
            "an image is cut into parts with text between them (pan and scan), so that it is not known beforehand how "
            "many tokens of a part stay: switch that off in --mm-processor-kwargs"
        )
    dropped = set(places[kept:])
    return [place for place in range(len(is_placeholder)) if place not in dropped]


def full_places(length: int, gaps: Sequence[Gap]) -> list[int]:
    """Find where the tokens of a shortened prompt of ``length`` tokens are in the full one.

    All placeholders of an image are said to be where its first one is: which of them stay is not known yet.

    Example:
        >>> full_places(6, [Gap(start=1, kept=2, total=5)])
        [0, 1, 1, 6, 7, 8]
    """
    places, shift, here = [], 0, 0
    for start, kept, total in sorted(gaps):
        places += [place + shift for place in range(here, start)] + [start + shift] * kept
        shift, here = shift + total - kept, start + kept
    return places + [place + shift for place in range(here, length)]


def to_columns(offsets: Tensor, like: Tensor) -> Tensor:
    """Write int64 ``offsets`` [n, AXES] from an image's first token as columns [n, AXES * DIGITS] of features.

    Raises:
        ValueError: an offset that DIGITS digits cannot hold.
    """
    if offsets.numel() and int(offsets.max()) >= BASE**DIGITS:
        raise ValueError(f"an image of {int(offsets.max()) + 1} tokens: at most {BASE**DIGITS} can be told apart")
    return torch.cat([offsets // BASE, offsets % BASE], -1).to(like)


def from_columns(columns: Tensor) -> Tensor:
    """Read the offsets, int64 ``[n, AXES]``, that ``to_columns`` wrote."""
    high, low = columns.long().split(AXES, -1)
    return high * BASE + low
