"""What is wrong with a data set is said with its name, split, column and row."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image

from tests.training.tables import (
    columns_of,
    png,
    write_benchmark,
    write_jsonl,
    write_pairs,
    write_parquet,
    write_videos,
)
from training.tasks import make_task


def test_unknown_names_list_the_known():
    with pytest.raises(
        ValueError, match=r"task='popes' is unknown; known tasks: ocr, .*mixed, pope, .*msrvtt_qa, custom"
    ):
        make_task("popes", "test", 4)


def test_unknown_splits_list_the_known():
    with pytest.raises(ValueError, match="pope: split='train' must be one of test, adversarial, popular, random"):
        make_task("pope", "train", 4)


def test_without_network_the_hub_says_what_to_do():
    with pytest.raises(
        RuntimeError, match=r"pope: lmms-lab-encoder/POPE, split 'test': could not .*dataset_path=FOLDER"
    ):
        make_task("pope", "test", 4)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"task='pope' needs the package datasets: pip install 'toprl-kernels\[eval\]'"
    ):
        make_task("pope", "test", 4)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match="metric='bleu' needs the package sacrebleu"):
        make_task("flickr30k", "test", 4, metric="bleu")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ocr", {"dataset_path": "x"}, "ocr: dataset_path='x' has no meaning"),
        ("ocr", {"metric": "anls"}, "ocr: metric='anls' has no meaning"),
        ("pope", {"ocr_hints": True}, "pope: ocr_hints=True has no meaning"),
        ("pope", {"video_dir": "x"}, "pope: video_dir='x' has no meaning"),
        ("pope", {"dataset_path": "x", "revision": "main"}, "pope: revision='main' has no meaning"),
        ("pope", {"metric": "cider"}, "pope: metric='cider' must be one of f1_yes"),
        ("msvd_qa", {}, "msvd_qa: is not on the Hub; pass dataset_path=FOLDER with test_q.json"),
        ("custom", {}, "custom: needs dataset_path=FILE"),
        ("custom", {"dataset_path": "x"}, "custom: metric=None must be one of exact_match, vqa_accuracy"),
        ("custom", {"dataset_path": "x", "metric": "mme"}, "custom: metric='mme' must be one of"),
    ],
)
def test_options_of_other_tasks_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, "test", 4, **options)


@pytest.mark.parametrize("size", [0, -1])
def test_sizes(tmp_path, size):
    write_benchmark(tmp_path, "pope", "test")
    with pytest.raises(ValueError, match=f"size={size} must be at least 1"):
        make_task("pope", "test", size, dataset_path=str(tmp_path))


def test_index_out_of_range(tmp_path):
    write_benchmark(tmp_path, "pope", "test")
    task = make_task("pope", "test", 9, dataset_path=str(tmp_path))
    with pytest.raises(IndexError, match="index=3 is outside"):
        task[3]


@pytest.mark.parametrize(("name", "column"), [("pope", "answer"), ("pope", "image"), ("textvqa", "ocr_tokens")])
def test_missing_column(tmp_path, name, column):
    split = "test" if name == "pope" else "validation"
    write_benchmark(tmp_path, name, split, **{column: None})
    message = rf"{name}: .*, split '{split}': missing column\(s\) {column}; it has question_id, .*Rename"
    with pytest.raises(ValueError, match=message):
        make_task(name, "test", 4, dataset_path=str(tmp_path))


def test_missing_column_of_the_joined_table(tmp_path):
    write_benchmark(tmp_path, "gqa", "testdev")
    images = tmp_path / "testdev_balanced_images" / "testdev-00000-of-00001.parquet"
    write_parquet(images, {"id": ["n0"]})
    with pytest.raises(ValueError, match=r"testdev_balanced_images: missing column\(s\) image"):
        make_task("gqa", "test", 4, dataset_path=str(tmp_path))
    write_parquet(images, {"id": ["n0", "n0"], "image": [png(0), png(1)]})
    with pytest.raises(ValueError, match="row 1: column 'id' repeats 'n0'"):
        make_task("gqa", "test", 4, dataset_path=str(tmp_path))


def test_empty_split(tmp_path):
    write_parquet(tmp_path / "test.parquet", columns_of("custom"))
    rows = {name: [] for name in columns_of("custom")}
    write_parquet(tmp_path / "train.parquet", rows)
    (tmp_path / "val.jsonl").write_text("")
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=f"custom: .*split '{split}': the split is empty"):
            make_task("custom", split, 4, dataset_path=str(tmp_path), metric="exact_match")


@pytest.mark.parametrize("broken", [b"no image", png(1)[:-30], b"", png(1).replace(b"IDAT", b"IDAX")])
def test_corrupt_image(tmp_path, broken):
    write_benchmark(tmp_path, "pope", "test", image=[{"bytes": b, "path": None} for b in (png(0), broken, png(2))])
    task = make_task("pope", "test", 9, dataset_path=str(tmp_path))
    task[0], task[2]
    with pytest.raises(ValueError, match=r"pope: .*, split 'test', row 1: column 'image' is not a readable image"):
        task[1]


def test_missing_image_file(tmp_path):
    row = {"image": "gone.png", "question": "?", "answer": "x"}
    write_jsonl(tmp_path / "test.jsonl", [row])
    task = make_task("custom", "test", 9, dataset_path=str(tmp_path), metric="exact_match")
    with pytest.raises(ValueError, match=r"row 0: column 'image' is not a readable image \(FileNotFoundError"):
        task[0]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("pope", {"answer": ["yes", "perhaps", "no"]}, "row 1: column 'answer' is 'perhaps', not yes or no"),
        ("pope", {"question": ["a", None, "b"]}, "row 1: column 'question' is null"),
        ("vizwiz_vqa", {"answers": [["a"] * 10, ["a"], ["a"] * 10]}, "row 1: column 'answers' has 1 answers of 1"),
        ("vizwiz_vqa", {"answers": [["a"] * 10, [""] * 10, []]}, "row 1: column 'answers' has 0 answers of 10"),
        ("ai2d", {"answer": ["0", "4", "1"]}, "row 1: column 'answer' is '4', not the index of one of 4 options"),
        ("ai2d", {"answer": ["0", "-1", "1"]}, "row 1: column 'answer' is '-1'"),
        ("ai2d", {"answer": ["0", "x", "1"]}, "row 1: column 'answer' is 'x'"),
        ("flickr30k", {"caption": [["a"], [], ["b"]]}, "row 1: column 'caption' is empty"),
        (
            "refcoco",
            {"bbox": [[0.0, 0, 8, 6], [0, 0, 20, 6], [0, 0, 1, 1]]},
            "row 1: column 'bbox' .* is no box inside",
        ),
        ("refcoco", {"bbox": [[0.0, 0, 8, 6], [0, 0, 0, 6], [0, 0, 1, 1]]}, "row 1: column 'bbox' .* is no box inside"),
        ("refcoco", {"bbox": [[0.0, 0, 8, 6], [0, 0, 6], [0, 0, 1, 1]]}, "row 1: column 'bbox' has 3 numbers"),
    ],
)
def test_bad_cells(tmp_path, name, changes, message):
    write_benchmark(tmp_path, name, "val" if name == "vizwiz_vqa" else "test", **changes)
    options = {"caption_tokenizer": "simple"} if name == "flickr30k" else {}
    task = make_task(name, "test", 9, dataset_path=str(tmp_path), **options)
    first = task[0]
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        [task[i] for i in range(1, len(task))]
    assert first.key.endswith(("/0", "/0.0"))


def test_an_expression_missing(tmp_path):
    write_benchmark(tmp_path, "refcoco", "test", answer=[["a"], [], ["b"]])
    with pytest.raises(ValueError, match=r"refcoco: .*row 1: column 'answer' is empty"):
        make_task("refcoco", "test", 9, dataset_path=str(tmp_path))


# --- files ---


def test_where_files_are_looked_for(tmp_path):
    path = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is neither a file nor a folder"):
        make_task("pope", "test", 4, dataset_path=path)
    write_benchmark(tmp_path, "refcoco", "testA")
    # "test" is not "testA"
    with pytest.raises(FileNotFoundError, match=r"has no test\*.*; it has data/testA-00000-of-00001.parquet"):
        make_task("refcoco", "test", 4, dataset_path=str(tmp_path))
    assert len(make_task("refcoco", "testA", 9, dataset_path=str(tmp_path))) == 6
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"must end with one of .parquet, .json, .jsonl"):
        make_task("pope", "test", 4, dataset_path=str(tmp_path / "rows.csv"))


def test_several_files_of_a_split(tmp_path):
    folder = tmp_path / "data"
    for shard in range(2):
        write_parquet(folder / f"test-0000{shard}-of-00002.parquet", columns_of("pope"))
    write_parquet(tmp_path / ".cache" / "test.parquet", columns_of("pope"))  # left by download tools
    assert len(make_task("pope", "test", 9, dataset_path=str(tmp_path))) == 6
    write_parquet(tmp_path / "copy" / "test.parquet", columns_of("pope"))
    with pytest.raises(ValueError, match="has several test"):
        make_task("pope", "test", 9, dataset_path=str(tmp_path))
    assert len(make_task("pope", "test", 9, dataset_path=str(tmp_path / "copy" / "test.parquet"))) == 3


def test_a_changed_file_is_read_again(tmp_path):
    row = {"image": "0.png", "question": "?", "answer": "x"}
    (tmp_path / "0.png").write_bytes(png(0))
    for count in (1, 2):
        write_jsonl(tmp_path / "test.jsonl", [row] * count)
        assert len(make_task("custom", "test", 9, dataset_path=str(tmp_path), metric="exact_match")) == count


@pytest.mark.parametrize("content", ["{", '{"image": "a"}\n{"ima', "[1, 2"])
def test_unreadable_files(tmp_path, content):
    (tmp_path / "test.jsonl").write_text(content)
    with pytest.raises(
        ValueError, match=r"custom: .*split 'test': test.jsonl could not be read as json \(.+\); repair"
    ):
        make_task("custom", "test", 4, dataset_path=str(tmp_path), metric="exact_match")
    (tmp_path / "train.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"train.parquet could not be read as parquet"):
        make_task("custom", "train", 4, dataset_path=str(tmp_path), metric="exact_match")


def test_other_encodings_are_named_with_file_and_line(tmp_path):
    rows = [f'{{"image": "a", "question": "{text}", "answer": "x"}}' for text in ("?", "Straße?")]
    for encoding, line in (("latin-1", 2), ("utf-16", 1)):
        (tmp_path / "test.jsonl").write_bytes("\n".join(rows).encode(encoding))
        with pytest.raises(ValueError, match=rf"test.jsonl, line {line} is not UTF-8 \(.*save the file as UTF-8"):
            make_task("custom", "test", 4, dataset_path=str(tmp_path), metric="exact_match")


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("I", "tiff"), ("F", "tiff")])
def test_images_of_more_than_eight_bits_are_refused(tmp_path, mode, suffix):
    """PIL would make them white or black without a word."""
    Image.new(mode, (8, 6), 1000).save(tmp_path / f"a.{suffix}")
    write_jsonl(tmp_path / "test.jsonl", [{"image": f"a.{suffix}", "question": "?", "answer": "x"}])
    task = make_task("custom", "test", 4, dataset_path=str(tmp_path), metric="exact_match")
    with pytest.raises(ValueError, match=r"row 0: column 'image' is an image of PIL's mode .*save it as 8-bit"):
        task[0]


def test_repeated_ids_are_refused(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{"image": "a", "question": "?", "answer": "x", "id": n} for n in (7, 8, 7)])
    with pytest.raises(ValueError, match="row 2: column 'id' repeats 7 of row 0"):
        make_task("custom", "test", 4, dataset_path=str(tmp_path), metric="exact_match")


@pytest.mark.parametrize(("column", "values"), [("question", ["a", " ", "c", "d"]), ("answer", ["a", "", "c", "d"])])
def test_blank_cells_of_benchmarks_are_refused(tmp_path, column, values):
    write_benchmark(tmp_path, "gqa", "testdev", **{column: values})
    task = make_task("gqa", "test", 9, dataset_path=str(tmp_path))
    with pytest.raises(ValueError, match=f"row 1: column '{column}' is blank"):
        task[1]


# --- questions and answers in two files, videos ---


@pytest.mark.parametrize(
    ("file", "rows", "message"),
    [
        ("test_a.json", [{"answer": "a"}, {"answer": "b"}], "test_a.json, row 0: no 'question_id'; .*by order only"),
        ("test_a.json", [{"answer": "a", "question_id": 10}], "1 question_id.* in only one .*first '11'"),
        ("test_a.json", [{"answer": "a", "question_id": 10}] * 2, "test_a.json: row 1 repeats question_id 10"),
        ("test_q.json", {"question": "x"}, "test_q.json: .*list of objects"),
        ("test_q.json", None, "has no test_q.json"),
    ],
)
def test_bad_pairs(tmp_path, file, rows, message):
    write_videos(write_pairs(tmp_path))
    (tmp_path / file).write_text(json.dumps(rows))
    if rows is None:
        (tmp_path / file).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=f"msvd_qa: .*{message}"):
        make_task("msvd_qa", "test", 4, dataset_path=str(tmp_path))


def test_videos_missing(tmp_path):
    write_pairs(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"msvd_qa: video_dir=.* has no video; unpack"):
        make_task("msvd_qa", "test", 4, dataset_path=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="video_dir='/nowhere' is no folder"):
        make_task("msvd_qa", "test", 4, dataset_path=str(tmp_path), video_dir="/nowhere")
    write_videos(tmp_path)
    (tmp_path / "videos" / "def.avi").write_bytes(b"no video")
    task = make_task("msvd_qa", "test", 4, dataset_path=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"row 1: column 'video_name' .*def.avi is not a readable video .*repair the file"
    ):
        task[1]
    (tmp_path / "videos" / "def.avi").unlink()
    task = make_task("msvd_qa", "test", 4, dataset_path=str(tmp_path))
    with pytest.raises(ValueError, match=r"row 1: column 'video_name' no video 'def' or 'v_def' among the 1 of"):
        task[1]
