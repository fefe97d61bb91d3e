"""The folder of an evaluation: its settings, one line per answered sample, and what a stopped run left of them.

Every rank appends to a shard of its own, ``samples-<rank>.jsonl``; when all is answered they become ``samples.jsonl``.
A line is written in one piece after its batch: a process that is killed leaves whole lines and at most one torn end.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from training.fingerprint import differences

FULL, FREE = "full", "free"  # the "budget" of the unpruned run, and of methods that choose how many tokens to keep


@dataclass(frozen=True)
class Cell:
    """One run over a task: what a line belongs to."""

    task: str
    method: str
    budget: str
    seed: int

    @classmethod
    def of(cls, record: dict[str, Any]) -> Cell:
        return cls(record["task"], record["method"], record["budget"], record["seed"])


def write_whole(path: Path, text: str) -> None:
    """Write aside, then swap: a reader never sees half a file."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


class Store:
    """The records in ``folder``."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.settings, self.merged = folder / "settings.json", folder / "samples.jsonl"
        self.shard = folder / f"samples-{rank}.jsonl"
        self._lock: IO[str] | None = None

    # -- by rank 0, while the others wait --------------------------------------------------------------------------

    def open(self, settings: dict[str, Any], overwrite: bool = False) -> list[str]:
        """Claim the folder for these settings; returns what there is to say about what a stopped run left.

        Raises:
            RuntimeError: another process is at work in the folder.
            ValueError: the folder holds results of other settings (the message names them), or is damaged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / ".lock", "w")  # noqa: SIM115 - held until close()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise RuntimeError(f"another evaluation is at work in {self.folder}; choose another --output_dir") from None
        if overwrite:
            for path in (*self.files(), self.settings):
                path.unlink(missing_ok=True)
        settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        if self.settings.is_file():
            changed = differences(json.loads(self.settings.read_text()), settings)
            if changed:
                raise ValueError(
                    f"{self.folder} holds results of other settings ({'; '.join(changed)}); "
                    "go on with those, choose another --output_dir, or start again with --overwrite"
                )
        elif files := self.files():
            raise ValueError(f"{files[0]} has no settings.json beside it; choose another --output_dir or --overwrite")
        write_whole(self.settings, json.dumps(settings, indent=1))
        said = [f"{path.name}: dropped a half-written last line" for path in self.files() if self._repair(path)]
        if answered := sum(1 for _ in self.records()):
            said.append(f"resumed: {answered} answers are there already")
        return said

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @staticmethod
    def _repair(path: Path) -> bool:
        """Cut off what stands behind the last end of a line."""
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return False
        with open(path, "rb+") as file:
            file.truncate(whole)
        return True

    def merge(self, cells: Sequence[Cell]) -> dict[Cell, dict[int, dict[str, Any]]]:
        """All shards as samples.jsonl, ordered by cell and sample; returns the records by cell and index."""
        found: dict[Cell, dict[int, dict[str, Any]]] = {cell: {} for cell in cells}
        for record in self.records():
            found[Cell.of(record)][record["index"]] = record
        lines = [json.dumps(rows[index]) + "\n" for rows in found.values() for index in sorted(rows)]
        write_whole(self.merged, "".join(lines))
        for path in self.files():
            if path != self.merged:
                path.unlink()
        return found

    # -- by every rank ---------------------------------------------------------------------------------------------

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("samples*.jsonl"))

    def records(self) -> Iterator[dict[str, Any]]:
        """Every answer, once: the end of a merge may have left a line in two files.

        Raises:
            ValueError: a line is not a record.
        """
        seen: set[tuple[Cell, int]] = set()
        for path in self.files():
            with open(path) as file:
                for number, line in enumerate(file, 1):
                    try:
                        record = json.loads(line)
                        place = Cell.of(record), record["index"]
                    except (json.JSONDecodeError, KeyError, TypeError) as error:
                        raise ValueError(
                            f"{path}, line {number} is damaged ({error}); delete the line and run again"
                        ) from error
                    if place not in seen:
                        seen.add(place)
                        yield record

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Add the answers of a batch to this rank's shard; they are on the disk when this returns."""
        with open(self.shard, "ab", buffering=0) as file:
            file.write("".join(json.dumps(record) + "\n" for record in records).encode())
            os.fsync(file.fileno())
