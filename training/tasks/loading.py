"""Rows of a data set, from the Hub or a local folder; every error names data set, split, column, row and the fix."""

from __future__ import annotations

import importlib
import io
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image, ImageOps

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
EMPTY = "the split is empty; download it again or choose another split"
NO_ROWS = "corresponds to no data"  # what datasets calls a file without a row
# PIL's modes of more than 8 bits per channel; its convert("RGB") clips them to white, or to black
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class Source:
    """One split of one configuration of a data set on the Hub; ``image_config`` is joined to it by image id."""

    dataset: str
    split: str
    config: str | None = None
    image_config: str | None = None


def need(module: str, what: str) -> Any:
    """Import a module of the ``eval`` extra.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{what} needs the package {module}: pip install 'toprl-kernels[eval]'") from error


class Table:
    """The rows of one split, images still encoded."""

    def __init__(self, where: str, data: Dataset, folder: Path | None, columns: Sequence[str]) -> None:
        self.where, self.folder = where, folder
        missing = [c for c in columns if c not in data.column_names]
        if missing:
            raise ValueError(
                f"{where}: missing column(s) {', '.join(missing)}; it has {', '.join(data.column_names)}. "
                "Rename its columns, or point dataset_path at the right data set"
            )
        if not len(data):
            raise ValueError(f"{where}: {EMPTY}")
        self.data = _encoded(data.select_columns(list(columns)))

    def __len__(self) -> int:
        return len(self.data)

    def column(self, name: str) -> list[Any]:
        """All values of a column (not for images: they would all be read)."""
        return list(self.data.select_columns([name])[name])

    def row(self, number: int, nullable: Collection[str] = ()) -> dict[str, Any]:
        """A row.

        Raises:
            ValueError: a column outside ``nullable`` is null.
        """
        row = self.data[number]
        for column, value in row.items():
            if value is None and column not in nullable:
                raise self.error(number, column, "is null", "fill it in or drop the row")
        return row

    def image(self, number: int, column: str, value: Any) -> Image.Image:
        """Decode the image of a cell - a path, encoded bytes, or both as ``datasets`` stores them - upright, in RGB.

        Raises:
            ValueError: missing file, not a readable image, or one of more than 8 bits per channel.
        """
        content, path = value, None
        if isinstance(value, dict):
            content, path = value.get("bytes"), value.get("path")
        elif isinstance(value, str):
            content, path = None, value
        try:
            if content is None:
                if not path:
                    raise ValueError("neither bytes nor path")
                content = (self.folder or Path()).joinpath(path).read_bytes()
            image = Image.open(io.BytesIO(content))
            mode, picture = image.mode, ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:  # PIL's decoders raise whatever a broken file makes them raise
            problem = f"is not a readable image ({type(error).__name__}: {error})"
            raise self.error(number, column, problem, "replace the file or drop the row") from error
        if mode in DEEP_MODES:
            problem = f"is an image of PIL's mode {mode}: more than 8 bits per channel"
            raise self.error(number, column, problem, "scale its values to 0..255 and save it as 8-bit RGB or grey")
        return picture

    def error(self, number: int, column: str, problem: str, fix: str) -> ValueError:
        return ValueError(f"{self.where}, row {number}: column {column!r} {problem}; {fix}")


class Loaded(NamedTuple):
    """A data set, how errors call it, and the folder that paths in it are relative to (None on the Hub)."""

    where: str
    data: Dataset
    folder: Path | None


def load_table(
    task: str, source: Source, columns: Sequence[str], dataset_path: str | None = None, revision: str | None = None
) -> Table:
    """``load`` as a Table with ``columns``."""
    return Table(*load(task, source, dataset_path, revision), columns)


def load(task: str, source: Source, dataset_path: str | None = None, revision: str | None = None) -> Loaded:
    """Load a split.

    Args:
        dataset_path: a parquet, JSON or JSONL file, or a folder with files named after the split (see ``find_files``);
            None loads from the Hub.
        revision: commit, tag or branch of the Hub's repository.

    Raises:
        FileNotFoundError: no such file or folder, or none for this split.
        ValueError: unreadable or empty.
        RuntimeError: the Hub's data set could not be loaded.
    """
    datasets = need("datasets", f"task={task!r}")
    part = f"split {source.split!r}" + (f" of {source.config}" if source.config else "")
    if dataset_path is None:
        where = f"{task}: {source.dataset}, {part}"
        try:
            data = datasets.load_dataset(source.dataset, source.config, split=source.split, revision=revision)
        except Exception as error:
            if NO_ROWS in str(error):
                raise ValueError(f"{where}: {EMPTY}") from error
            raise RuntimeError(
                f"{where}: could not be loaded from the Hub ({type(error).__name__}: {error}); check network and "
                "login, or download it elsewhere and pass dataset_path=FOLDER"
            ) from error
        return Loaded(where, data, None)
    where = f"{task}: {dataset_path}, {part}"
    files = find_files(task, Path(dataset_path), source)
    kind = FORMATS[files[0].suffix]
    if kind == "json":
        for file in files:
            _refuse_other_encodings(where, file)
    try:
        if not any(file.stat().st_size for file in files):
            raise ValueError(NO_ROWS)
        data = datasets.load_dataset(kind, data_files={"rows": [str(file) for file in files]}, split="rows")
    except Exception as error:
        if NO_ROWS in str(error):
            raise ValueError(f"{where}: {EMPTY}") from error
        # datasets says what happened in the cause, and in itself only that something did
        cause = " ".join(str(error.__cause__ or error).split())[:500]
        raise ValueError(
            f"{where}: {', '.join(file.name for file in files)} could not be read as {kind} ({cause}); "
            "repair the file - every row needs the same columns with the same types"
        ) from error
    return Loaded(where, data, files[0].parent)


def load_pairs(task: str, split: str, dataset_path: str | None) -> Loaded:
    """Questions of ``test_q.json`` with the answers of ``test_a.json``, joined by question_id.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no list of objects with a question_id, a repeated id, or ids in one file only.
    """
    datasets = need("datasets", f"task={task!r}")
    if dataset_path is None:
        raise ValueError(f"{task}: is not on the Hub; pass dataset_path=FOLDER with {split}_q.json and {split}_a.json")
    tables = []
    for name in (f"{split}_q.json", f"{split}_a.json"):
        path = Path(dataset_path, name)
        if not path.is_file():
            raise FileNotFoundError(f"{task}: dataset_path={dataset_path!r} has no {name}")
        rows: dict[str, dict[str, Any]] = {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for number, row in enumerate(content):
                if rows.setdefault(str(row["question_id"]), row) is not row:
                    raise ValueError(f"row {number} repeats question_id {row['question_id']!r}")
        except KeyError as error:
            fix = "files whose rows match by order only cannot be joined safely: add the ids"
            raise ValueError(f"{task}: {path}, row {number}: no {error}; {fix}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{task}: {path}: {error}; it must be a list of objects with unique question_id"
            ) from error
        tables.append(rows)
    questions, answers = tables
    alone = sorted(questions.keys() ^ answers.keys())
    if alone:
        raise ValueError(
            f"{task}: {dataset_path}: {len(alone)} question_id(s) in only one of {split}_q.json and {split}_a.json, "
            f"first {alone[0]!r}; the files must belong together"
        )
    merged = [{**answers[name], **row} for name, row in questions.items()]
    data = datasets.Dataset.from_list([{k: None if v is None else str(v) for k, v in row.items()} for row in merged])
    return Loaded(f"{task}: {dataset_path}, split {split!r}", data, Path(dataset_path))


def find_files(task: str, path: Path, source: Source) -> list[Path]:
    """The files of a split: ``path`` itself if it is a file, else those below it named after the split.

    Matches what a download from the Hub looks like - ``test-00000-of-00002.parquet``, ``test.jsonl``,
    ``test/0000.parquet`` - in any folder below ``path``; with a configuration, only below a folder of its name.

    Raises:
        FileNotFoundError: no such path, or no file for the split.
        ValueError: another kind of file, or files for the split in more than one folder or format.
    """
    if path.is_file():
        if path.suffix not in FORMATS:
            raise ValueError(f"{task}: dataset_path={str(path)!r} must end with one of {', '.join(FORMATS)}")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{task}: dataset_path={str(path)!r} is neither a file nor a folder")
    known = []
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        if file.suffix in FORMATS and file.is_file() and not any(part.startswith(".") for part in parts):
            known.append((file, parts))
    named = re.compile(re.escape(source.split) + r"(-\d.*)?")
    found = [
        file
        for file, parts in known
        if (source.config is None or source.config in parts[:-1])
        and (named.fullmatch(file.stem) or (source.split in parts[:-1] and file.stem.isdigit()))
    ]
    wanted = (f"{source.config}/" if source.config else "") + f"{source.split}*.{{parquet,json,jsonl}}"
    if not found:
        there = ", ".join("/".join(parts) for _, parts in known[:8]) or "nothing of the kind"
        raise FileNotFoundError(f"{task}: dataset_path={str(path)!r} has no {wanted}; it has {there}")
    if len({(file.parent, file.suffix) for file in found}) > 1:
        raise ValueError(
            f"{task}: dataset_path={str(path)!r} has several {wanted}: {', '.join(map(str, found))}; name one of them"
        )
    return found


def _refuse_other_encodings(where: str, path: Path) -> None:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: {path.name}, line {number} is not UTF-8 ({error}); save the file as UTF-8"
                ) from error


def _encoded(data: Dataset) -> Dataset:
    """The data set with its images left as bytes or paths, so that a broken one can be reported with its row."""
    from datasets import Image as ImageFeature
    from datasets import List

    for name, feature in data.features.items():
        if isinstance(feature, ImageFeature):
            data = data.cast_column(name, ImageFeature(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, ImageFeature):
            data = data.cast_column(name, List(ImageFeature(decode=False)))
    return data
