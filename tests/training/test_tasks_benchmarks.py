"""Every benchmark from a local copy with exactly its columns: samples, prompts, scores, corpus numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.tables import columns_of, picture, write_benchmark, write_jsonl, write_pairs, write_videos
from training.tasks import TASKS, make_task
from training.tasks.benchmarks import BENCHMARKS
from training.tasks.scoring import CUSTOM_METRICS

SPLITS = {"pope": "test", "flickr30k": "test", "vizwiz_vqa": "val", "refcoco": "test", "textvqa": "validation"}
SPLITS |= {"gqa": "testdev", "ai2d": "test", "mathvista": "testmini", "scienceqa": "test", "mme": "test"}
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def load(tmp_path, name, size=100, seed=0, changes=None, **options):
    folder = write_benchmark(tmp_path, name, SPLITS[name], **(changes or {}))
    return make_task(name, "test", size, seed, str(folder), **options)


def samples_of(task):
    return [task[i] for i in range(len(task))]


@pytest.mark.parametrize("name", SPLITS)
def test_every_benchmark_loads_with_exactly_its_columns(tmp_path, name):
    assert set(columns_of(name)) == set(BENCHMARKS[name].columns)
    task = load(tmp_path, name, **({"caption_tokenizer": "simple"} if name == "flickr30k" else {}))
    samples = samples_of(task)
    assert task.name == name
    assert len({s.key for s in samples}) == len(samples) >= 3
    for sample in samples:
        assert sample.key.startswith(f"{name}/{SPLITS[name]}/")
        assert sample.image.mode == "RGB"
        assert task.text(sample).strip()
        assert 0 <= task.score("I do not know", sample) <= 1
    facts = task.describe()
    assert facts["split"] == SPLITS[name]
    assert json.loads(json.dumps(facts)) == facts


def test_all_of_the_table_have_a_test():
    assert set(BENCHMARKS) == {*SPLITS, "activitynet_qa", "msvd_qa", "msrvtt_qa"}
    assert set(TASKS) > set(BENCHMARKS)


def test_the_docs_name_every_task_data_set_and_column():
    text = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text()
    for name in (*TASKS, *CUSTOM_METRICS):
        assert f"`{name}`" in text, name
    for name, spec in BENCHMARKS.items():
        (line,) = [line for line in text.splitlines() if line.startswith("| ") and f"`{name}`" in line]
        wanted = {spec.splits["test"].dataset} - {"local files"}
        wanted |= set() if spec.pairs else {spec.splits["test"].split}
        assert all(word in line for word in (*wanted, *spec.columns, spec.level)), name
        assert f"**{name}" in text or f", {name}" in text, f"the traps of {name}"


def test_pope(tmp_path):
    task = load(tmp_path, "pope")
    samples = samples_of(task)
    assert task.text(samples[0]) == "Is there a cat in the image?" + SHORT
    assert [s.answer for s in samples] == ["yes", "no", "yes"]
    assert [s.image.getpixel((0, 0))[0] for s in samples] == [0, 10, 20]
    result = task.corpus(["Yes", "yes.", "No"], samples)
    assert next(iter(result)) == "f1"
    assert result["f1"] == pytest.approx(0.5)
    assert result["yes_ratio"] == pytest.approx(2 / 3)
    assert result["f1/random"] == pytest.approx(2 / 3)
    assert result["f1/popular"] == 0


def test_pope_by_category(tmp_path):
    write_benchmark(tmp_path, "pope", "test")
    (tmp_path / "data").rename(tmp_path / "Full")
    (tmp_path / "Full" / "test-00000-of-00001.parquet").rename(tmp_path / "Full" / "popular-00000-of-00001.parquet")
    assert len(make_task("pope", "popular", 9, dataset_path=str(tmp_path))) == 3
    with pytest.raises(FileNotFoundError, match=r"pope: .* has no Full/random\*"):
        make_task("pope", "random", 9, dataset_path=str(tmp_path))


def test_vizwiz(tmp_path):
    task = load(tmp_path, "vizwiz_vqa")
    sample = task[0]
    assert "respond with 'Unanswerable'." in task.text(sample)
    assert task.text(sample).endswith(SHORT)
    # yellow x 4 after normalisation, gold x 2, red x 2, one each of blue and unsuitable
    assert task.score("Yellow", sample) == 1
    assert task.score("gold", sample) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert task.score("blue", sample) == pytest.approx(9 / 3 / 10)
    assert task.corpus(["yellow", "gold", "x"], samples_of(task)) == {"vqa_accuracy": pytest.approx((1 + 0.6) / 3)}


def test_textvqa_has_ocr_hints_only_when_asked(tmp_path):
    task = load(tmp_path, "textvqa")
    assert task.text(task[0]) == "what colour is it?" + SHORT
    assert task.describe()["ocr_hints"] is False
    hinted = make_task("textvqa", "test", 9, dataset_path=str(tmp_path), ocr_hints=True)
    assert hinted.text(hinted[0]) == "what colour is it?\nReference OCR token: STOP, 4 WAY" + SHORT
    assert hinted.describe()["ocr_hints"] is True


def test_flickr30k(tmp_path):
    task = load(tmp_path, "flickr30k", caption_tokenizer="simple")
    samples = samples_of(task)
    assert samples[0].references == ("A dog runs in the park.", "The dog is running outside.")
    assert "caption" in task.text(samples[0])
    right, wrong = task.score("A dog runs in the park.", samples[0]), task.score("A horse is blue", samples[0])
    assert 1 >= right > 0.4 > wrong
    result = task.corpus([s.answer for s in samples], samples)
    assert list(result) == ["cider_simple_tokenizer"]
    # the corpus weights words as the task does when its samples are the corpus
    assert result["cider_simple_tokenizer"] == pytest.approx(10 * sum(task.score(s.answer, s) for s in samples) / 3)
    bleu = make_task("flickr30k", "test", 9, dataset_path=str(tmp_path), metric="bleu")
    assert bleu.corpus([s.answer for s in samples], samples) == {"bleu4": 1}
    assert bleu.score("A dog runs in a park.", samples[0]) < 1


def test_flickr30k_without_java_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="install Java"):
        load(tmp_path, "flickr30k")


def test_refcoco_asks_for_the_box_of_each_expression(tmp_path):
    task = load(tmp_path, "refcoco")
    samples = samples_of(task)
    assert [s.question for s in samples] == ["man on left", "guy in blue", "red car", "dog", "small dog", "puppy"]
    assert [s.key for s in samples[:3]] == ["refcoco/test/0.0", "refcoco/test/0.1", "refcoco/test/1.0"]
    # x, y, width, height = 2, 3, 4, 3 in an image of 8 x 6
    assert samples[0].bbox == samples[1].bbox == (0.25, 0.5, 0.75, 1.0)
    assert samples[2].bbox == (0, 0, 1, 1)
    text = task.text(samples[0])
    assert text.endswith("man on left")
    assert "between 0 and 1" in text
    assert "short description" not in text  # the data set's own question is that of captioning
    assert task.score("[0.25, 0.5, 0.75, 1.0]", samples[0]) == 1
    assert task.score("[0.25, 0.5, 0.75, 0.75]", samples[0]) == pytest.approx(0.5)
    assert task.score("[2, 3, 6, 6]", samples[0]) == 0  # pixels are not what was asked for
    replies = [
        "[0.25, 0.5, 0.75, 0.75]",
        "[0.25, 0.5, 0.75, 0.7]",
        "[0, 0, 1, 1]",
        "?",
        "[0, 0, 1, 1]",
        "[0.5, 0, 1, 1]",
    ]
    result = task.corpus(replies, samples)
    assert result["acc@0.5"] == pytest.approx(3 / 6)
    assert result["unparsed_ratio"] == pytest.approx(1 / 6)
    assert result["mean_iou"] == pytest.approx((0.5 + 0.4 + 1 + 0 + 0.25 + 0.5) / 6)


def test_gqa_joins_images_by_id(tmp_path):
    task = load(tmp_path, "gqa")
    samples = samples_of(task)
    # imageId n2, n0, n2, n1 - not the order of the images
    assert [s.image.getpixel((0, 0))[0] for s in samples] == [20, 0, 20, 10]
    assert task.text(samples[0]) == "Is it overcast?" + SHORT
    assert task.corpus(["No.", "woman", "cat", "left"], samples) == {"accuracy": pytest.approx(3 / 4)}


def test_gqa_with_an_image_missing(tmp_path):
    task = load(tmp_path, "gqa", changes={"imageId": ["n2", "n9", "n2", "n1"]})
    task[0]
    with pytest.raises(
        ValueError, match=r"gqa: .*testdev_balanced_instructions, row 1: column 'imageId' 'n9' is no id"
    ):
        task[1]


def test_ai2d(tmp_path):
    task = load(tmp_path, "ai2d")
    sample = task[0]
    assert task.text(sample) == "What is the predator?\nA. owl\nB. mouse\nC. grass\nD. hawk" + LETTER
    assert [s.answer for s in samples_of(task)] == ["D", "A", "B"]
    assert task.score("D. hawk", sample) == task.score("hawk", sample) == 1
    assert task.score("A", sample) == 0


def test_scienceqa(tmp_path):
    task = load(tmp_path, "scienceqa")
    samples = samples_of(task)
    assert task.text(samples[0]) == "Context: Look at the pair.\nWhich is larger?\nA. a\nB. b" + LETTER
    assert task.text(samples[1]).startswith("What is the capital?")
    assert [s.answer for s in samples] == ["A", "C", "B"]
    assert "So b" not in task.text(samples[0])  # the solution
    assert task.corpus(["A", "C", "water"], samples) == {"accuracy": pytest.approx(2 / 3)}


def test_scienceqa_train_comes_from_another_repository():
    splits = BENCHMARKS["scienceqa"].splits
    assert (splits["train"].dataset, splits["test"].dataset) == (
        "lmms-lab/ScienceQA-IMG",
        "lmms-lab-encoder/ScienceQA-IMG",
    )


def test_mathvista(tmp_path):
    task = load(tmp_path, "mathvista")
    cubes, ratio, shape, sides = samples_of(task)
    assert task.text(cubes) == "How many cubes?\nAnswer the question using a single integer number."
    assert task.text(ratio).startswith("What is the ratio? (Unit: m)\nAnswer")
    assert task.text(ratio).endswith("floating-point number with two decimal places.")
    assert task.text(shape) == "Which shape?\nA. circle\nB. square" + LETTER
    assert task.text(sides).endswith("using a Python list.")
    for reply in ("7", "There are 3 red and 4 blue: the answer is 7.", "3 + 4 = 7 cubes on 1 table", "7.0"):
        assert task.score(reply, cubes) == 1, reply
    assert task.score("8", cubes) == task.score("", cubes) == task.score("-7", cubes) == 0
    assert task.score("Answer: 0.329", ratio) == 1  # rounds to the precision asked for
    assert task.score("0.34", ratio) == 0
    assert task.score("(B)", shape) == task.score("a square", shape) == 1
    assert task.score("a rectangle", shape) == 0  # the benchmark would take the most similar option
    assert task.score("The sides are [3, 4, 5.0]", sides) == 1
    assert task.score("[3, 4]", sides) == task.score("3, 4, 5", sides) == 0
    replies = ["7", "0.33", "A", "[]"]
    assert task.corpus(replies, [cubes, ratio, shape, sides]) == {"accuracy_rule_based": pytest.approx(0.5)}


def test_mathvista_without_answers(tmp_path):
    task = load(tmp_path, "mathvista", changes={"answer": ["", "0.33", "square", "[]"]})
    with pytest.raises(ValueError, match=r"row 0: column 'answer' is '', no number.*testmini"):
        task[0]


def test_mme(tmp_path):
    task = load(tmp_path, "mme")
    samples = samples_of(task)
    assert task.text(samples[0]) == "Is the output 0?" + SHORT
    result = task.corpus(["yes", "no", "no", "no"], samples)
    assert result["accuracy"] == pytest.approx(3 / 4)
    assert result["accuracy_plus"] == pytest.approx(1 / 2)
    assert result["accuracy_plus/count"] == 0
    assert (result["cognition"], result["perception"]) == (pytest.approx(200), pytest.approx(50))


@pytest.mark.parametrize("seed", range(4))
def test_a_subset_of_mme_keeps_pairs_together(tmp_path, seed):
    columns = {name: values * 5 for name, values in columns_of("mme").items()}
    columns["question_id"] = [f"{i // 2}.png" for i in range(20)]
    task = load(tmp_path, "mme", size=7, seed=seed, changes=columns)
    assert len(task) == 6
    task.corpus(["yes"] * 6, samples_of(task))


def test_a_subset_is_the_same_for_the_same_seed(tmp_path):
    columns = {name: values * 10 for name, values in columns_of("pope").items()}
    folder = str(write_benchmark(tmp_path, "pope", "test", **columns))

    def keys(size, seed):
        return [s.key for s in samples_of(make_task("pope", "test", size, seed, folder))]

    assert keys(8, 0) == keys(8, 0)
    assert keys(8, 0) != keys(8, 1)
    assert len(set(keys(8, 0))) == 8
    order = [int(key.rsplit("/", 1)[1]) for key in keys(8, 0)]
    assert order == sorted(order)
    assert keys(30, 0) == keys(1000, 1) == [f"pope/test/{i}" for i in range(30)]


def test_activitynet_qa(tmp_path):
    rows = columns_of("activitynet_qa")
    write_jsonl(
        tmp_path / "test.jsonl", [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    )
    write_videos(tmp_path)
    task = make_task("activitynet_qa", "test", 9, dataset_path=str(tmp_path))
    samples = samples_of(task)
    assert task.text(samples[0]) == "What is the person doing?" + SHORT
    assert [len(s.video) for s in samples] == [8, 8, 8]
    assert samples[0].image is samples[0].video[0]
    assert task.describe()["num_frames"] == 8
    # v_abc.mp4 has 20 frames
    assert samples[0].video_metadata["frames_indices"] == [0, 2, 5, 8, 10, 13, 16, 19]
    assert task.corpus(["Dancing.", "no", "2"], samples) == {"accuracy_judge_free": pytest.approx(2 / 3)}


@pytest.mark.parametrize("name", ["msvd_qa", "msrvtt_qa"])
def test_questions_and_answers_in_two_files_are_joined_by_id(tmp_path, name):
    write_videos(write_pairs(tmp_path))
    task = make_task(name, "test", 9, dataset_path=str(tmp_path), num_frames=4)
    samples = samples_of(task)
    assert [(s.question, s.answer) for s in samples] == [("What is a man doing?", "cook"), ("Who sings?", "woman")]
    assert len(samples[0].video) == 4


def test_images_are_turned_upright(tmp_path):
    """A photo that its camera marked as lying on the side."""
    lying = picture(1, (8, 4))
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "photo.jpg", exif=exif)
    row = {"image": "photo.jpg", "question": "?", "answer": "x"}
    write_jsonl(tmp_path / "test.jsonl", [row])
    task = make_task("custom", "test", 1, dataset_path=str(tmp_path), metric="exact_match")
    assert task[0].image.size == (4, 8)
