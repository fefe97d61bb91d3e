"""``make_task``: every task by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.scenes import KINDS
from training.tasks.base import Task
from training.tasks.benchmarks import BENCHMARKS, with_ocr
from training.tasks.custom import complete, custom_spec
from training.tasks.loading import Loaded, Table, load, load_pairs, load_table
from training.tasks.scene_task import SceneTask
from training.tasks.scoring import Metric, make_metric
from training.tasks.table_task import Spec, TableTask
from training.tasks.video import VideoFolder

SCENES = (*KINDS, "mixed")
TASKS = (*SCENES, *BENCHMARKS, "custom")


def make_task(
    name: str,
    split: str,
    size: int,
    seed: int = 0,
    dataset_path: str | None = None,
    *,
    metric: str | None = None,
    revision: str | None = None,
    video_dir: str | None = None,
    num_frames: int = 8,
    ocr_hints: bool = False,
    caption_tokenizer: str = "ptb",
) -> Task:
    """The task called ``name``.

    Args:
        split: a split of the data set; "test" always is the one that results are reported on.
        size: at most this many samples (a random subset, the same for the same seed); scenes: exactly as many.
        seed: of the subset, or of the scenes.
        dataset_path: a local file or folder instead of the Hub.
        metric: of "custom", or another than the default where a benchmark has several.
        revision: commit, tag or branch of the Hub's data set.
        video_dir: the folder with the videos; dataset_path if not given.
        num_frames: frames per video (Video-LLaVA: 8).
        ocr_hints: TextVQA with OCR tokens in the prompt.
        caption_tokenizer: of corpus CIDEr: "ptb" (needs Java) or "simple".

    Raises:
        ValueError: unknown name (the message lists the known ones), split or metric; an option of another task;
            unusable data.
        FileNotFoundError: no data at dataset_path or video_dir.
        ImportError, RuntimeError: a package, Java or the Hub is missing.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r} is unknown; known tasks: {', '.join(TASKS)}")
    given = {
        "dataset_path": dataset_path,
        "metric": metric,
        "revision": revision,
        "video_dir": video_dir,
        "ocr_hints": ocr_hints,
    }
    if name in SCENES:
        _refuse(name, given, *given)
        return SceneTask(name, split, size, seed)
    loaded: Loaded | None = None
    if name == "custom":
        if dataset_path is None:
            raise ValueError("custom: needs dataset_path=FILE or FOLDER (JSONL, JSON or parquet) and metric=NAME")
        spec = custom_spec(split, metric)
        loaded = load(name, spec.splits[split], dataset_path)
        spec = complete(spec, loaded.data.column_names, loaded.where)
    else:
        spec = BENCHMARKS[name]
        if split not in spec.splits:
            raise ValueError(f"{name}: split={split!r} must be one of {', '.join(spec.splits)}")
        if metric is not None and metric not in spec.metrics:
            raise ValueError(f"{name}: metric={metric!r} must be one of {', '.join(spec.metrics)}")
        if spec.pairs:
            loaded = load_pairs(name, split, dataset_path)
    _refuse(name, given, *_foreign(spec, dataset_path))
    options: dict[str, Any] = {}
    if ocr_hints:
        spec = replace(spec, text=with_ocr)
    if name == "textvqa":
        options["ocr_hints"] = ocr_hints
    metric = metric or spec.metrics[0]
    if metric == "cider":
        options["caption_tokenizer"] = caption_tokenizer
    if revision:
        options["revision"] = revision

    def metric_of(references: Callable[[], list[Sequence[str]]]) -> Metric:
        return make_metric(metric, references, caption_tokenizer)

    metric_of(list)  # what it needs is missing now or not at all: no download for nothing
    source = spec.splits[split]
    table = Table(*loaded, spec.columns) if loaded else load_table(name, source, spec.columns, dataset_path, revision)
    if name == "custom" and "id" in spec.columns:
        _refuse_repeated_ids(table)
    images = videos = None
    if source.image_config:
        joined = replace(source, config=source.image_config)
        images = load_table(name, joined, ("id", "image"), dataset_path, revision)
    if spec.video:
        videos = _videos(name, video_dir or dataset_path)
    return TableTask(spec, split, table, size, seed, metric_of, images, videos, num_frames, options)


def _refuse_repeated_ids(table: Table) -> None:
    first: dict[str, int] = {}
    for number, value in enumerate(table.column("id")):
        if value is not None and first.setdefault(str(value), number) != number:
            problem = f"repeats {value!r} of row {first[str(value)]}"
            raise table.error(number, "id", problem, "give every row its own id, or leave the column out")


def _foreign(spec: Spec, dataset_path: str | None) -> list[str]:
    """The options that mean nothing for this task."""
    foreign = []
    if spec.name != "textvqa":
        foreign.append("ocr_hints")
    if not spec.video:
        foreign.append("video_dir")
    if dataset_path is not None:
        foreign.append("revision")
    return foreign


def _refuse(name: str, given: dict[str, Any], *options: str) -> None:
    for option in options:
        if given[option]:
            raise ValueError(f"{name}: {option}={given[option]!r} has no meaning for this task; leave it out")


def _videos(name: str, folder: str | None) -> VideoFolder:
    if folder is None:
        raise ValueError(f"{name}: needs video_dir=FOLDER with the unpacked videos of the data set")
    path = Path(folder)
    if path.is_file():
        path = path.parent
    if not path.is_dir():
        raise FileNotFoundError(f"{name}: video_dir={folder!r} is no folder")
    videos = VideoFolder(path)
    if not len(videos):
        raise FileNotFoundError(f"{name}: video_dir={folder!r} has no video; unpack the data set's videos there")
    return videos
