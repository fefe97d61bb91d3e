"""Metrics of a training run on disk and, where asked for, in an experiment tracker."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

TRACKERS = ("tensorboard", "wandb", "trackio", "none")


class Log:
    """metrics.jsonl (one row per iteration), validation.jsonl, and the tracker of --report_to.

    A resumed run first cuts off what it will write again, and a line that a killed process left unfinished. Rows are
    written by a thread of its own, in their order, so that no rollout waits for a disk or a tracker; what went wrong is
    raised by the next call or by ``close``.

    Args:
        folder: of the run.
        iteration: iterations already done; 0 starts new files.
        report_to: one of ``TRACKERS``.
        settings: the run's flags, shown by wandb and trackio.

    Attributes:
        rows: what metrics.jsonl held when the run went on.

    Raises:
        ImportError: the tracker is not installed.
        ValueError: a line before the last one is not JSON.
    """

    def __init__(
        self, folder: Path, iteration: int, report_to: str = "tensorboard", settings: Mapping[str, Any] | None = None
    ) -> None:
        self.tracker = make_tracker(report_to, folder, iteration, settings or {})
        self.metrics, self.validations = folder / "metrics.jsonl", folder / "validation.jsonl"
        self.rows = _cut(self.metrics, iteration)  # a row tells the iteration it is of, from 0 ...
        _cut(self.validations, iteration)  # ... and a validation, how many were done before it: the next is due now

        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log")
        self._pending: list[Future[None]] = []

    def write(self, row: dict[str, Any]) -> None:
        """One iteration."""
        self._later(self.metrics, row, "")

    def validation(self, row: dict[str, Any]) -> None:
        """One validation, ``row["iteration"]`` iterations after the start."""
        self._later(self.validations, row, "validation/")

    def close(self) -> None:
        """Wait until all rows are written."""
        self._thread.shutdown()
        self._raise()
        self.tracker.close()

    def _later(self, path: Path, row: dict[str, Any], prefix: str) -> None:
        self._raise()
        self._pending.append(self._thread.submit(self._write, path, row, prefix))

    def _write(self, path: Path, row: dict[str, Any], prefix: str) -> None:
        _append(path, row)
        self.tracker.log({f"{prefix}{name}": value for name, value in flat(row).items()}, row["iteration"])

    def _raise(self) -> None:
        while self._pending and self._pending[0].done():
            self._pending.pop(0).result()


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row; a list is one per stage."""
    numbers: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, list):
            numbers |= {f"{name}/stage_{stage + 1}": one for stage, one in enumerate(value)}
        else:
            numbers[name] = value
    return numbers


def _append(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def _cut(path: Path, end: int) -> list[dict[str, Any]]:
    """Keep the rows with ``iteration`` below ``end``, and return them; the file is never there in part."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text().split("\n") if end and path.is_file() else []
    for number, line in enumerate(lines[:-1]):  # what is behind the last newline is nothing, or unfinished
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number + 1}: not JSON: {line[:80]!r}; repair or remove it") from error
    rows = [row for row in rows if row["iteration"] < end]
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(aside, path)
    return rows


class _Nothing:
    def log(self, numbers: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration or None)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Tracker:
    """wandb or trackio, which has the same functions."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        try:
            self.module = importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"--report_to {name}: the package is missing; pip install {name}") from error
        self.module.init(project="toprl", name=folder.name, config=dict(settings))

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.module.log(numbers, step=step)

    def close(self) -> None:
        self.module.finish()


def make_tracker(name: str, folder: Path, iteration: int, settings: Mapping[str, Any]) -> Any:
    """The tracker of --report_to."""
    if name == "none":
        return _Nothing()
    return _TensorBoard(folder, iteration) if name == "tensorboard" else _Tracker(name, folder, settings)
