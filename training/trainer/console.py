"""What a run shows while it goes on."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from training.trainer.config import PPOConfig
from training.trainer.launch import Terminated


class Console:
    """The progress bar with the last row's numbers; a context manager.

    Args:
        done: iterations done before.
        quiet: show nothing (all processes but the first).
    """

    def __init__(self, config: PPOConfig, done: int, quiet: bool) -> None:
        columns: tuple[ProgressColumn, ...] = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
        )
        self.status = ""
        self._config, self._quiet = config, quiet
        columns += (TimeRemainingColumn(), TextColumn("{task.fields[status]}"))
        self._progress = Progress(*columns, disable=quiet or not sys.stdout.isatty())
        self._lines = not quiet and self._progress.disable  # a log file gets a line per iteration instead of a bar
        self._bar = self._progress.add_task(config.task, total=config.iterations, completed=done, status="")

    def __enter__(self) -> Console:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl."""
        kept = "/".join(f"{share:.2f}" for share in row["retained"])
        self.status = f"reward {row['reward']:.3f} kept {kept} acc {row['accuracy']:.3f} kl {row['kl_k3']:.3f}"
        self._progress.update(self._bar, advance=1, status=self.status)
        if self._lines:
            count = f"{row['iteration'] + 1}/{self._config.iterations}"
            print(f"{self._config.task} {count}: {self.status} ({row['seconds']:.1f} s)", flush=True)

    def stopped(self, error: BaseException, iteration: int) -> None:
        """The run ends before its last iteration; ``iteration`` of them are in the newest checkpoint."""
        if self._quiet:
            return
        reason = "SIGTERM" if isinstance(error, Terminated) else type(error).__name__
        kept = f"a checkpoint of all {iteration} finished iterations is in {self._config.output_dir}/checkpoints"
        print(f"{reason}: {kept if iteration else 'no iteration was finished'}; go on with --resume auto", flush=True)
