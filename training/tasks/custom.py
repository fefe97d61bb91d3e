"""``custom``: a JSONL, JSON or parquet file of one's own as a task.

    {"image": "photos/1.jpg", "question": "What does the sign say?", "answer": "stop"}

Columns: ``question``; one of ``image`` (path or bytes), ``images`` (a list of them) and ``video`` (path); and what the
metric needs - ``answer`` or ``answers``, ``choices`` with ``answer`` (text, letter or index), or ``bbox`` (x1, y1,
x2, y2 as shares of width and height). ``id`` is optional.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from training.metrics import yes_no
from training.tasks.loading import Source
from training.tasks.scoring import CUSTOM_METRICS
from training.tasks.table_task import BadCell, Spec, letters, question_and_options

SHOWN = ("image", "images", "video")


def custom_spec(split: str, metric: str | None) -> Spec:
    """The row of ``custom``, before its file is seen.

    Raises:
        ValueError: no metric, or an unknown one.
    """
    if metric not in CUSTOM_METRICS:
        raise ValueError(f"custom: metric={metric!r} must be one of {', '.join(CUSTOM_METRICS)}")
    needed = {"choice": ("choices", "answer"), "iou": ("bbox",), "vqa_accuracy": ("answers",), "f1_yes": ("answer",)}
    return Spec(
        name="custom",
        level="any",
        splits={split: Source("local files", split)},
        columns=("question", *needed.get(metric, ())),
        fields=lambda row: custom_fields(row, metric),
        text=question_and_options,
        metrics=(metric,),
        max_new_tokens=64 if metric in ("bleu", "cider", "iou") else 16,
    )


def complete(spec: Spec, columns: Sequence[str], where: str) -> Spec:
    """``spec`` with the optional columns that the file has.

    Raises:
        ValueError: nothing to look at, or nothing to compare answers with.
    """
    shown = [name for name in SHOWN if name in columns]
    if len(shown) != 1:
        raise ValueError(
            f"{where}: needs exactly one of the columns {', '.join(SHOWN)}; it has {', '.join(shown) or 'none'} "
            f"(all columns: {', '.join(columns)})"
        )
    wanted = [name for name in ("answer", "answers", "id") if name in columns and name not in spec.columns]
    if not {"answer", "answers", "bbox"} & {*wanted, *spec.columns}:
        raise ValueError(f"{where}: missing column answer (or answers) for metric={spec.metrics[0]!r}")
    video = shown[0] if shown[0] == "video" else None
    return replace(
        spec,
        columns=(*spec.columns, *shown, *wanted),
        nullable=tuple(name for name in wanted if name != "answer" or "answers" in wanted),
        image=None if video else shown[0],
        video=video,
    )


def custom_fields(row: dict[str, Any], metric: str) -> dict[str, Any]:
    """The columns as fields of a Sample."""
    question = str(row["question"])
    if "<image>" in question or "<video>" in question:
        raise BadCell("question", "has an <image> or <video> placeholder", "remove it: images go before the question")
    answers = tuple(str(a) for a in row.get("answers") or ())
    if metric != "vqa_accuracy" and not all(answer.strip() for answer in answers):  # an annotator may have said nothing
        raise BadCell("answers", "has a blank one", "remove it or drop the row")
    answer = str(row["answer"]) if row.get("answer") is not None else answers[0] if answers else ""
    fields: dict[str, Any] = {"question": question, "answer": answer, "answers": answers}
    if row.get("id") is not None:
        fields["info"] = {"id": str(row["id"])}
    if metric == "iou":
        if len(row["bbox"]) != 4:
            raise BadCell("bbox", f"has {len(row['bbox'])} numbers, not x1, y1, x2, y2")
        return fields | {"bbox": tuple(row["bbox"])}
    if metric == "choice":
        return fields | {"choices": tuple(map(str, row["choices"])), "answer": _letter(answer, row["choices"])}
    if metric == "f1_yes" and yes_no(answer) == "other":
        raise BadCell("answer", f"is {answer!r}, not yes or no")
    if metric == "vqa_accuracy" and len(answers) < 4:
        fix = "use metric='exact_match', which takes the best over the answers"
        raise BadCell("answers", f"has {len(answers)} annotators; VQA accuracy needs at least 4", fix)
    return fields


def _letter(answer: str, choices: Sequence[Any]) -> str:
    """The letter of the right option, given as text, letter or index (in this order)."""
    if not 2 <= len(choices) <= 26:
        raise BadCell("choices", f"has {len(choices)} options; 2 to 26 can be lettered")
    texts, names = [str(c) for c in choices], letters(choices)
    if texts.count(answer) == 1:
        return names[texts.index(answer)]
    if answer in names:
        return answer
    if answer.isdigit() and int(answer) < len(names):
        return names[int(answer)]
    raise BadCell("answer", f"is {answer!r}: neither text nor letter nor index of one of {texts}")
