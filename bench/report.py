"""Results of one suite: rows and further tables, written to JSON and CSV after every case."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COMPARABLE = ("device", "device_type", "torch_threads", "torch", "triton", "python", "git_commit", "quick")


def columns_of(rows: list[Row]) -> list[str]:
    """All keys, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


class Report:
    """Collects what a suite measures.

    Args:
        suite: name of the files, ``<suite>.json`` and ``<suite>.csv``.
        where: the environment, a part of both files.
        folder: where to write; None writes nothing.
        resume: take over the rows of an interrupted run from ``folder``.

    Raises:
        ValueError: ``resume`` without a folder, or the rows there come from another environment.
    """

    def __init__(self, suite: str, where: Row, folder: Path | None = None, *, resume: bool = False) -> None:
        self.suite, self.where, self.folder = suite, where, folder
        self.rows: list[Row] = []
        self.tables: dict[str, list[Row]] = {}
        if resume:
            if folder is None:
                raise ValueError("--resume needs the --output_dir of the interrupted run")
            self._take_over(folder / f"{suite}.json")

    def _take_over(self, path: Path) -> None:
        if not path.exists():
            return
        before = json.loads(path.read_text())
        for name in COMPARABLE:
            if before["environment"].get(name) != self.where.get(name):
                raise ValueError(
                    f"--resume: {path.name} was measured with {name}={before['environment'].get(name)!r}, this run has "
                    f"{self.where.get(name)!r}; start anew without --resume"
                )
        self.rows = before["rows"]

    def has(self, case: str) -> bool:
        """Whether the rows of ``case`` are there already."""
        return any(row.get("case") == case for row in self.rows)

    def add(self, rows: list[Row]) -> None:
        """Rows of one finished case; on disk when this returns."""
        self.rows += rows
        self.write()

    def add_table(self, name: str, rows: list[Row]) -> None:
        """A further table, in the JSON beside ``rows``."""
        self.tables[name] = rows
        self.write()

    def content(self) -> Row:
        return {"rows": self.rows, **self.tables}

    def write(self) -> None:
        """Whole files, each replaced at once, so that a killed run leaves the last complete state."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.suite}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"environment": self.where, **self.content()}, indent=1) + "\n")
        part.replace(path)
        path = self.folder / f"{self.suite}.csv"
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys([*columns_of(self.rows), *self.where])))
            writer.writeheader()
            writer.writerows({**self.where, **row} for row in self.rows)
        part.replace(path)
