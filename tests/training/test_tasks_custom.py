"""A data set of one's own: every metric, image column and file format."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.training.tables import columns_of, picture, png, write_jsonl, write_parquet, write_video
from training.tasks import make_task
from training.tasks.scoring import CUSTOM_METRICS


def write(tmp_path, *rows, name="test.jsonl"):
    """A JSONL file beside one image; rows without something to look at get it."""
    (tmp_path / "pictures").mkdir(exist_ok=True)
    picture(3).save(tmp_path / "pictures" / "a.png")
    full = []
    for row in rows:
        shown = {} if {"image", "images", "video"} & row.keys() else {"image": "pictures/a.png"}
        full.append({"question": "What?", **shown, **row})
    return write_jsonl(tmp_path / name, full)


def custom(tmp_path, metric, size=9, split="test", **options):
    return make_task("custom", split, size, dataset_path=str(tmp_path), metric=metric, **options)


CASES = {
    "exact_match": ({"answer": "stop"}, {"Stop.": 1, "go": 0}),
    "vqa_accuracy": ({"answers": ["two"] * 3 + ["3"] * 2}, {"2": 3 / 5 * 2 / 3 + 2 / 5, "3": (2 + 3 * 2) / 15}),
    "choice": ({"choices": ["cat", "dog"], "answer": "B"}, {"B": 1, "the dog": 1, "A": 0}),
    "f1_yes": ({"answer": "Yes"}, {"yes, it is": 1, "no": 0, "perhaps": 0}),
    "iou": ({"bbox": [0, 0, 0.5, 1]}, {"[0, 0, 0.5, 1]": 1, "[0, 0, 0.5, 0.5]": 0.5, "left": 0}),
    "anls": ({"answers": ["hello", "help"]}, {"help": 1, "helo": 0.8, "x": 0}),
    "relaxed_accuracy": ({"answer": "100"}, {"104": 1, "106": 0}),
    "bleu": ({"answer": "a dog runs in the park"}, {"A dog runs in the park": 1, "zebra": 0}),
    "cider": ({"answer": "a dog runs in the park"}, {"a dog runs in the park": 1, "zebra": 0}),
}


@pytest.mark.parametrize("metric", CUSTOM_METRICS)
def test_every_metric(tmp_path, metric):
    row, replies = CASES[metric]
    other = {"answer": "two men sit"} if metric == "cider" else row
    write(tmp_path, row, other)
    task = custom(tmp_path, metric, caption_tokenizer="simple")
    sample = task[0]
    assert sample.key == "custom/test/0"
    assert sample.image.getpixel((0, 0)) == (30, 100, 200)
    for reply, score in replies.items():
        assert task.score(reply, sample) == pytest.approx(score), reply
    result = task.corpus(list(replies)[:1] * 2, [sample, task[1]])
    assert all(isinstance(value, float) for value in result.values())
    assert task.describe()["metric"] == metric


def test_several_references_take_the_best(tmp_path):
    write(tmp_path, {"answer": "sofa", "answers": ["sofa", "couch"]}, {"answers": ["x"], "answer": None})
    task = custom(tmp_path, "exact_match")
    assert task.score("couch", task[0]) == 1
    assert task[1].answer == "x"
    assert task.corpus(["couch", "y"], [task[0], task[1]]) == {"accuracy": 0.5}


@pytest.mark.parametrize("answer", ["dog", "B", 1, "1"])
def test_the_right_option_as_text_letter_or_index(tmp_path, answer):
    write(tmp_path, {"choices": ["cat", "dog"], "answer": answer})
    task = custom(tmp_path, "choice")
    assert task[0].answer == "B"
    assert task.text(task[0]) == "What?\nA. cat\nB. dog"


def test_several_images(tmp_path):
    write(tmp_path, {"images": ["pictures/a.png", "pictures/a.png"], "answer": "x"})
    sample = custom(tmp_path, "exact_match")[0]
    assert len(sample.all_images) == 2
    assert sample.image is sample.images[0]


def test_a_video(tmp_path):
    write_video(tmp_path / "clips" / "one.mp4", 5)
    write(tmp_path, {"video": "clips/one.mp4", "answer": "x"}, {"video": "one", "answer": "x"})
    task = custom(tmp_path, "exact_match", num_frames=3)
    assert [len(task[i].video) for i in range(2)] == [3, 3]
    with pytest.raises(FileNotFoundError, match="video_dir="):
        custom(tmp_path, "exact_match", video_dir=str(tmp_path / "pictures"))


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "parquet of other tools", "parquet with pictures"])
def test_formats(tmp_path, kind):
    columns = columns_of("custom")
    if kind.startswith("json"):
        for i in range(3):
            (tmp_path / f"{i}.png").write_bytes(png(i))
        rows = [
            {"image": f"{i}.png", "question": q, "answer": a}
            for i, (q, a) in enumerate(zip(columns["question"], columns["answer"], strict=True))
        ]
        if kind == "json":
            (tmp_path / "test.json").write_text(json.dumps(rows))
        else:
            write_jsonl(tmp_path / "test.jsonl", rows)
    elif kind == "parquet":  # plain bytes
        write_parquet(tmp_path / "test.parquet", columns)
    elif kind == "parquet of other tools":  # a struct of bytes and path without the library's metadata
        images = [{"bytes": b, "path": None} for b in columns["image"]]
        table = pyarrow.table({**columns, "image": images})
        pyarrow.parquet.write_table(table, tmp_path / "test.parquet")
    else:
        write_parquet(tmp_path / "test.parquet", {**columns, "image": [picture(i) for i in range(3)]})
    task = custom(tmp_path, "exact_match")
    assert [task[i].image.getpixel((0, 0))[0] for i in range(3)] == [0, 10, 20]
    assert [task[i].answer for i in range(3)] == ["cat", "dog", "cow"]


def test_a_file_instead_of_a_folder(tmp_path):
    file = write(tmp_path, {"answer": "x"}, name="mine.jsonl")
    task = make_task("custom", "train", 9, dataset_path=str(file), metric="exact_match")
    assert task[0].image.size == (8, 6)
    with pytest.raises(FileNotFoundError, match=r"has no train\*.* it has mine.jsonl"):
        custom(tmp_path, "exact_match", split="train")


def test_ids_and_further_columns(tmp_path):
    write(tmp_path, {"answer": "x", "id": 17, "unused": "y"})
    assert custom(tmp_path, "exact_match")[0].info == {"id": "17"}


@pytest.mark.parametrize(
    ("metric", "row", "message"),
    [
        ("exact_match", {}, r"missing column answer \(or answers\)"),
        ("choice", {"answer": "A"}, r"missing column\(s\) choices"),
        ("iou", {"answer": "x"}, r"missing column\(s\) bbox"),
        ("exact_match", {"image": "a", "images": ["a"], "answer": "x"}, "exactly one of .*; it has image, images"),
    ],
)
def test_columns_that_the_metric_needs(tmp_path, metric, row, message):
    write(tmp_path, row)
    with pytest.raises(ValueError, match=f"custom: .*split 'test': .*{message}"):
        custom(tmp_path, metric)


def test_nothing_to_look_at(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{"question": "?", "answer": "x"}])
    with pytest.raises(ValueError, match="exactly one of the columns image, images, video; it has none"):
        custom(tmp_path, "exact_match")


@pytest.mark.parametrize(
    ("metric", "row", "message"),
    [
        ("exact_match", {"answer": ""}, "'answer' is blank"),
        ("exact_match", {"answer": None, "answers": []}, "'answer' is blank"),
        ("exact_match", {"answer": "  "}, "'answer' is blank"),
        ("exact_match", {"answers": ["x", " "]}, "'answers' has a blank one"),
        ("exact_match", {"answer": "x", "question": " "}, "'question' is blank"),
        (
            "exact_match",
            {"answer": "x", "question": "<image>\nWhat?"},
            "'question' has an <image> .*placeholder; remove",
        ),
        ("exact_match", {"answer": "x", "image": 1}, "'image' is not a readable image"),
        ("exact_match", {"answer": "x", "image": None}, "'image' is null"),
        ("exact_match", {"answer": "x", "images": []}, "'images' has no image"),
        ("exact_match", {"answer": None}, "'answer' is null"),
        ("vqa_accuracy", {"answers": ["x", "y", "z"]}, "'answers' has 3 annotators.*use metric='exact_match'"),
        ("f1_yes", {"answer": "maybe"}, "'answer' is 'maybe', not yes or no"),
        ("choice", {"answer": "C", "choices": ["a", "b"]}, "'answer' is 'C': neither text nor letter nor index"),
        ("choice", {"answer": "A", "choices": ["a"]}, "'choices' has 1 options"),
        ("iou", {"bbox": [0, 0, 1]}, "'bbox' has 3 numbers"),
        ("iou", {"bbox": [10, 20, 30, 40]}, "'bbox' .* is no box inside the image"),
    ],
)
def test_bad_rows(tmp_path, metric, row, message):
    write(tmp_path, row)
    task = custom(tmp_path, metric)
    with pytest.raises(ValueError, match=f"custom: .*split 'test', row 0: column {message}"):
        task[0]
