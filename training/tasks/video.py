"""Frames of a video file, decoded with PyAV."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
Clip = tuple[tuple[Image.Image, ...], Mapping[str, Any]]


@lru_cache(maxsize=8)  # benchmarks ask several questions about a video in a row
def read_frames(path: Path, num_frames: int) -> Clip:
    """``num_frames`` frames spread evenly from the first to the last, as RGB, and which ones they are.

    A video with fewer frames repeats some. Frames are counted in the order in which they are shown.

    Raises:
        ValueError: not a readable video.
    """
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate) if stream.average_rate else None
            announced = stream.frames  # 0 where the header does not say; often a little off
            packets = sum(1 for packet in container.demux(stream) if packet.size)
        indices = _spread(packets, num_frames)
        frames, total = _decode(path, indices)
        if total != packets:  # a packet need not give a frame; now the number is known
            indices = _spread(total, num_frames)
            frames, total = _decode(path, indices)
        if not total:
            raise ValueError("it has no frames")
        if total < announced / 2:
            raise ValueError(f"only {total} of its {announced} frames are there: it is cut off")
    except (av.error.FFmpegError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a readable video ({error})") from error
    return tuple(frames[i] for i in indices), {"total_num_frames": total, "fps": fps, "frames_indices": indices}


def _spread(total: int, number: int) -> list[int]:
    return np.linspace(0, max(0, total - 1), number).astype(int).tolist()


def _decode(path: Path, wanted: Collection[int]) -> tuple[dict[int, Image.Image], int]:
    """The wanted frames by number, and how many frames there are."""
    import av

    frames, total = {}, 0
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            if total in wanted:
                frames[total] = frame.to_image()
            total += 1
    return frames, total


class VideoFolder:
    """The video files below a folder, found by path or by name without suffix."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[str, Path] = {}
        for root, folders, files in os.walk(folder):
            folders.sort()
            for file in sorted(files):
                path = Path(root, file)
                if path.suffix.lower() in SUFFIXES:
                    self._paths.setdefault(path.stem, path)

    def __len__(self) -> int:
        return len(self._paths)

    def find(self, names: Sequence[str]) -> Path:
        """The file of the first of ``names`` that exists.

        Raises:
            ValueError: none of them.
        """
        for name in names:
            if (self.folder / name).is_file():
                return self.folder / name
            if name in self._paths:
                return self._paths[name]
        raise ValueError(f"no video {' or '.join(map(repr, names))} among the {len(self)} of {self.folder}")
