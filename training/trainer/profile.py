"""Where the time of an iteration goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Wall seconds per named phase; phases do not overlap, and what is in none of them is "other".

    On CUDA the device is waited for at the end of a phase, so that its work counts where it was asked for.

    Example:
        >>> phases = Phases()
        >>> with phases("rollout"):
        ...     pass
        >>> sorted(phases.take())
        ['other', 'rollout']
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._inside: str | None = None
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time within as ``name``'s, also when an exception ends it.

        Raises:
            RuntimeError: within another phase: the time would count twice.
        """
        if self._inside is not None:
            raise RuntimeError(f"phase {name!r} begins within {self._inside!r}; end that one first")
        self._inside, began = name, time.perf_counter()
        try:
            yield
            if self._cuda:
                torch.cuda.synchronize()
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began
            self._inside = None

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call (or the beginning), "other" last; starts anew."""
        now = time.perf_counter()
        seconds = {**self._seconds, "other": now - self._began - sum(self._seconds.values())}
        self._seconds, self._began = {}, now
        return seconds
