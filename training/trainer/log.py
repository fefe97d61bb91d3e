"""Metrics of a training run on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Log:
    """metrics.jsonl and TensorBoard; a resumed run cuts off what it will write again."""

    def __init__(self, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        rows = self.path.read_text().splitlines() if iteration and self.path.is_file() else []
        self.path.write_text("".join(row + "\n" for row in rows[:iteration]))
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration or None)

    def write(self, row: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if isinstance(value, list):
                for stage, one in enumerate(value):
                    self.writer.add_scalar(f"{name}/stage_{stage + 1}", one, row["iteration"])
            else:
                self.writer.add_scalar(name, value, row["iteration"])
