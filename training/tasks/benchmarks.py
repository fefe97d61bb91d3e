"""The benchmarks: one row each - where it is, its columns, what the model is asked, how an answer is scored.

Prompts are those of LLaVA-1.5's evaluation (as lmms-eval has them too) unless docs/tasks.md says otherwise.
"""

from __future__ import annotations

from typing import Any

from training.tasks import mathvista
from training.tasks.base import Sample
from training.tasks.loading import Source
from training.tasks.table_task import LETTER, SHORT, BadCell, Spec, letters, question_and_options

Row = dict[str, Any]
BOX_PROMPT = (
    "Bounding box coordinates are specified in the format [top-left x, top-left y, bottom-right x, bottom-right y]. "
    "All values are floating point numbers between 0 and 1. Provide the bounding box of the region this sentence "
    "describes: "
)


# --- columns -> fields of a Sample ---


def yes_no_fields(row: Row) -> Row:
    answer = str(row["answer"]).strip().lower()
    if answer not in ("yes", "no"):
        raise BadCell("answer", f"is {row['answer']!r}, not yes or no")
    info = {"id": str(row["question_id"]), "category": row["category"]}
    return {"question": row["question"].strip(), "answer": answer, "info": info}


def annotators_fields(row: Row) -> Row:
    """Answers of (usually ten) annotators; the one to show is the most frequent."""
    answers = tuple(map(str, row["answers"]))
    if len(answers) < 4 or not any(answers):
        problem = f"has {sum(map(bool, answers))} answers of {len(answers)} annotators; VQA accuracy needs 4 or more"
        raise BadCell("answers", problem, "a test split without answers cannot be scored: choose another split")
    info: Row = {"id": str(row["question_id"])}
    if "ocr_tokens" in row:
        info["ocr_tokens"] = tuple(row["ocr_tokens"])
    return {
        "question": row["question"].strip(),
        "answer": max(answers, key=answers.count),
        "answers": answers,
        "info": info,
    }


def flickr30k_fields(row: Row) -> Row:
    captions = tuple(row["caption"])
    if not any(captions):
        raise BadCell("caption", "is empty")
    info = {"id": str(row["img_id"]), "filename": row["filename"]}
    return {"question": "", "answer": captions[0], "answers": captions, "info": info}


def refcoco_fields(row: Row) -> Row:
    if len(row["bbox"]) != 4:
        raise BadCell("bbox", f"has {len(row['bbox'])} numbers, not x, y, width, height")
    # the data set's "question" asks for a caption; for grounding the caption is the question and the box the answer
    info = {"id": str(row["question_id"])}
    return {"question": row["answer"].strip(), "answer": "", "bbox": tuple(row["bbox"]), "info": info}


def gqa_fields(row: Row) -> Row:
    return {"question": row["question"].strip(), "answer": str(row["answer"]), "info": {"id": str(row["id"])}}


def lettered(row: Row, choices: list[str], info: Row) -> Row:
    """A question whose answer is the index of an option, as a number or a string."""
    answers = dict(zip(map(str, range(len(choices))), letters(choices), strict=True))
    if str(row["answer"]) not in answers:
        raise BadCell("answer", f"is {row['answer']!r}, not the index of one of {len(choices)} options")
    answer = answers[str(row["answer"])]
    return {"question": row["question"].strip(), "answer": answer, "choices": tuple(map(str, choices)), "info": info}


def ai2d_fields(row: Row) -> Row:
    return lettered(row, row["options"], {})


def scienceqa_fields(row: Row) -> Row:
    return lettered(row, row["choices"], {"hint": row["hint"] or ""})


def mathvista_fields(row: Row) -> Row:
    answer, choices = str(row["answer"]), [str(c) for c in row["choices"] or ()]
    if row["question_type"] == "multi_choice":
        if choices.count(answer) != 1:
            raise BadCell("answer", f"is {answer!r}, not one of the choices {choices}")
        answer = letters(choices)[choices.index(answer)]
    elif row["answer_type"] in ("integer", "float"):
        try:
            float(answer)
        except ValueError as error:
            problem = f"is {answer!r}, no number"
            raise BadCell("answer", problem, "the split 'test' has no answers: choose 'testmini'") from error
    info = {"id": str(row["pid"]), **{name: row[name] for name in ("unit", "precision", "answer_type")}}
    return {"question": row["question"].strip(), "answer": answer, "choices": tuple(choices), "info": info}


def video_fields(row: Row) -> Row:
    info = {"id": str(row["question_id"]), "video": str(row["video_name"])}
    question = row["question"].strip()
    question = question[:1].upper() + question[1:]
    return {"question": question.rstrip("?") + "?", "answer": str(row["answer"]), "info": info}


# --- Sample -> what the model is asked ---


def short(sample: Sample) -> str:
    return f"{sample.question}\n{SHORT}"


def vizwiz_text(sample: Sample) -> str:
    unanswerable = "When the provided information is insufficient, respond with 'Unanswerable'."
    return f"{sample.question}\n{unanswerable}\n{SHORT}"


def mme_text(sample: Sample) -> str:
    return f"{sample.question.replace(' Please answer yes or no.', '')}\n{SHORT}"


def option_letter(sample: Sample) -> str:
    hint = f"Context: {sample.info['hint']}\n" if sample.info.get("hint") else ""
    return f"{hint}{question_and_options(sample)}\n{LETTER}"


def mathvista_text(sample: Sample) -> str:
    unit = f" (Unit: {sample.info['unit']})" if sample.info["unit"] else ""
    asked = question_and_options(sample._replace(question=sample.question + unit))
    return f"{asked}\n{mathvista.instruction(sample)}"


def with_ocr(sample: Sample) -> str:
    """TextVQA with the data set's OCR tokens in the prompt."""
    return f"{sample.question}\nReference OCR token: {', '.join(sample.info['ocr_tokens'])}\n{SHORT}"


# --- the table ---


def _splits(dataset: str, *names: str, report: str) -> dict[str, Source]:
    splits = {name: Source(dataset, name) for name in names}
    return {**splits, "test": splits[report]}


def _gqa(part: str, split: str) -> Source:
    return Source("lmms-lab-encoder/GQA", split, f"{part}_instructions", f"{part}_images")


JUDGE = "papers have a language model judge the answers: their numbers are higher and depend on the judge's version"

BENCHMARKS = {
    spec.name: spec
    for spec in (
        Spec(
            name="pope",
            level="perception",
            splits={
                "test": Source("lmms-lab-encoder/POPE", "test"),
                **{n: Source("lmms-lab-encoder/POPE", n, "Full") for n in ("adversarial", "popular", "random")},
            },
            columns=("question_id", "question", "answer", "image", "category"),
            fields=yes_no_fields,
            text=short,
            metrics=("f1_yes",),
            trap="yes_ratio is of the model's answers (some harnesses print that of the labels, always 0.5)",
        ),
        Spec(
            name="vizwiz_vqa",
            level="perception",
            splits=_splits("lmms-lab-encoder/VizWiz-VQA", "val", report="val"),
            columns=("question_id", "image", "question", "answers"),
            fields=annotators_fields,
            text=vizwiz_text,
            metrics=("vqa_accuracy",),
            trap="the prompt names 'Unanswerable'; the Hub's test split has no answers, so val is reported",
        ),
        Spec(
            name="flickr30k",
            level="perception",
            splits={"test": Source("lmms-lab-encoder/flickr30k", "test")},
            columns=("image", "caption", "img_id", "filename"),
            fields=flickr30k_fields,
            text=lambda sample: "Provide a one-sentence caption for the provided image.",
            metrics=("cider", "bleu"),
            max_new_tokens=64,
            trap="this test split is the whole data set (31 783 images), not Karpathy's 1000",
        ),
        Spec(
            name="refcoco",
            level="perception",
            splits=_splits("lmms-lab-encoder/RefCOCO", "val", "test", "testA", "testB", report="test"),
            columns=("question_id", "image", "question", "answer", "bbox"),
            fields=refcoco_fields,
            text=lambda sample: BOX_PROMPT + sample.question,
            metrics=("iou",),
            max_new_tokens=48,
            several="answer",
            pixel_boxes=True,
            trap="grounding, not captioning; every expression of a row is a sample; boxes are 0-1 corners, so a model "
            "that answers in pixels or thousandths scores 0",
        ),
        Spec(
            name="textvqa",
            level="perception",
            splits=_splits("lmms-lab-encoder/textvqa", "train", "validation", report="validation"),
            columns=("question_id", "image", "question", "answers", "ocr_tokens"),
            fields=annotators_fields,
            text=short,
            metrics=("vqa_accuracy",),
            trap="OCR tokens in the prompt (ocr_hints) change scores: off by default, recorded; the Hub's test split "
            "has no answers, so validation is reported",
        ),
        Spec(
            name="gqa",
            level="reasoning",
            splits={
                "train": _gqa("train_balanced", "train"),
                "val": _gqa("val_balanced", "val"),
                "testdev": _gqa("testdev_balanced", "testdev"),
                "test": _gqa("testdev_balanced", "testdev"),
            },
            columns=("id", "imageId", "question", "answer"),
            fields=gqa_fields,
            text=short,
            metrics=("exact_match",),
            image=None,
            join="imageId",
            trap="images are in a table of their own, joined by imageId; testdev is reported",
        ),
        Spec(
            name="ai2d",
            level="reasoning",
            splits={"test": Source("lmms-lab-encoder/ai2d", "test")},
            columns=("question", "options", "answer", "image"),
            fields=ai2d_fields,
            text=option_letter,
            metrics=("choice",),
            trap="the no_mask variant (labels in the picture left readable) is another benchmark",
        ),
        Spec(
            name="mathvista",
            level="reasoning",
            splits=_splits("AI4Math/MathVista", "testmini", report="testmini"),
            columns=(
                *("pid", "question", "decoded_image", "choices", "unit", "precision"),
                *("answer", "question_type", "answer_type"),
            ),
            nullable=("choices", "unit", "precision"),
            fields=mathvista_fields,
            text=mathvista_text,
            metrics=("mathvista",),
            max_new_tokens=64,
            image="decoded_image",
            trap="answers are extracted by rules, not by a language model as the benchmark does: not its own numbers",
        ),
        Spec(
            name="scienceqa",
            level="reasoning",
            splits={
                "train": Source("lmms-lab/ScienceQA-IMG", "train"),
                "validation": Source("lmms-lab/ScienceQA-IMG", "validation"),
                "test": Source("lmms-lab-encoder/ScienceQA-IMG", "test"),
            },
            columns=("image", "question", "choices", "answer", "hint", "lecture", "solution"),
            nullable=("hint", "lecture", "solution"),
            fields=scienceqa_fields,
            text=option_letter,
            metrics=("choice",),
            trap="questions with an image only; the hint is in the prompt, lecture and solution are not",
        ),
        Spec(
            name="mme",
            level="both",
            splits={"test": Source("lmms-lab-encoder/MME", "test")},
            columns=("question_id", "image", "question", "answer", "category"),
            fields=yes_no_fields,
            text=mme_text,
            metrics=("mme",),
            group=("category", "question_id"),
            trap="two questions per image; a subset keeps them together, and perception and cognition sums of a subset "
            "are not those of the whole",
        ),
        Spec(
            name="activitynet_qa",
            level="video",
            splits={"test": Source("lmms-eval/ActivityNetQA", "test")},
            columns=("video_name", "question_id", "question", "answer", "type"),
            fields=video_fields,
            text=short,
            metrics=("normalised_match",),
            image=None,
            video="video_name",
            trap=JUDGE,
        ),
        *(
            Spec(
                name=name,
                level="video",
                splits={"test": Source("local files", "test"), "train": Source("local files", "train")},
                columns=("video_name", "question", "question_id", "answer"),
                fields=video_fields,
                text=short,
                metrics=("normalised_match",),
                image=None,
                video="video_name",
                pairs=True,
                trap=f"questions and answers are joined by question_id, never by order; {JUDGE}",
            )
            for name in ("msvd_qa", "msrvtt_qa")
        ),
    )
}
