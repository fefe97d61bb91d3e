"""From samples to model inputs: chat templates, several images, videos; the embedded model on a data set from disk."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata

from tests.training.tables import write_jsonl, write_pairs, write_videos
from toprl_models import tiny
from training.scenes import KINDS
from training.tasks import TASKS, answer, encode, make_task


class Recorder:
    """Stands for a processor of a video model (those of transformers need torchvision) and keeps its arguments."""

    chat_template = "a template"
    video_token = "<video>"
    bos: str | None = None

    class tokenizer:
        bos_token: str | None = None

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        (message,) = messages
        return (self.bos or "") + "".join(c.get("text", f"<{c['type']}> ") for c in message["content"])

    def __call__(self, **arguments: Any) -> BatchFeature:
        self.arguments = arguments
        return BatchFeature({"input_ids": torch.zeros(1, 1)})


def test_the_prompt_of_the_embedded_model_is_its_own():
    _, processor = tiny.load()
    for kind in (*KINDS, "mixed"):
        task = make_task(kind, "test", 4)
        samples = [task[i] for i in range(4)]
        images, texts = [s.image for s in samples], [tiny.prompt(s.question) for s in samples]
        expected = processor(images=images, text=texts, padding=True, return_tensors="pt")
        inputs = encode(processor, task, samples, "cpu")
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in inputs)


def test_videos_reach_the_processor_as_frames(tmp_path):
    task = make_task("msvd_qa", "test", 9, dataset_path=str(write_videos(write_pairs(tmp_path))))
    processor = Recorder()
    encode(processor, task, [task[0], task[1]], "cpu")
    arguments = processor.arguments
    assert [video.shape for video in arguments["videos"]] == [(8, 32, 32, 3)] * 2
    assert np.array_equal(arguments["videos"][0][3], np.asarray(task[0].video[3]))
    assert "images" not in arguments
    assert arguments["text"][0].startswith("<video> What is a man doing?\nAnswer")
    # the frames are sampled already; models with time stamps need to know which they are
    assert arguments["videos_kwargs"]["do_sample_frames"] is False
    metadata = [VideoMetadata(**m) for m in arguments["videos_kwargs"]["video_metadata"]]
    assert [m.total_num_frames for m in metadata] == [20, 12]
    assert metadata[0].timestamps == pytest.approx([0, 0.2, 0.5, 0.8, 1.0, 1.3, 1.6, 1.9])
    assert "add_special_tokens" not in arguments


def test_no_second_beginning_of_sequence():
    task = make_task("ocr", "test", 1)
    processor = Recorder()
    processor.bos = Recorder.tokenizer.bos_token = "<s>"
    try:
        encode(processor, task, [task[0]], "cpu")
    finally:
        Recorder.tokenizer.bos_token = None
    assert processor.arguments["add_special_tokens"] is False


def test_a_processor_without_a_template():
    task = make_task("ocr", "test", 1)
    processor = Recorder()
    processor.chat_template = ""
    with pytest.raises(ValueError, match=r"Recorder has no chat template; set processor\.chat_template"):
        encode(processor, task, [task[0]], "cpu")


@pytest.fixture
def scenes_on_disk(tmp_path):
    """Scenes of the embedded task, written as a data set of one's own, some rows with the image twice."""
    task = make_task("shape", "test", 12)
    rows = []
    for number in range(12):
        sample = task[number]
        sample.image.save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": sample.question, "answer": sample.answer})
    write_jsonl(tmp_path / "test.jsonl", rows)
    pairs = [{"images": [r.pop("image")] * (1 + i % 2), **r} for i, r in enumerate(map(dict, rows))]
    write_jsonl(tmp_path / "train.jsonl", pairs)
    return tmp_path


def test_the_embedded_model_answers_a_data_set_from_disk_as_the_scenes(scenes_on_disk):
    model, processor = tiny.load()
    results = []
    for task in (
        make_task("shape", "test", 12),
        make_task("custom", "test", 12, dataset_path=str(scenes_on_disk), metric="exact_match"),
    ):
        samples = [task[i] for i in range(12)]
        inputs = encode(processor, task, samples, "cpu")
        text, scores = answer(model, processor, task, samples, inputs)
        results.append((inputs, text, scores, task.corpus(text, samples)))
    (inputs, text, scores, corpus), theirs = results
    assert all(torch.equal(inputs[name], theirs[0][name]) for name in inputs)
    assert text == [t.split()[0] for t in theirs[1]]
    assert scores.mean() > 0.7
    assert corpus["accuracy"] == pytest.approx(scores.mean().item())


def test_several_images_in_one_prompt(scenes_on_disk):
    _, processor = tiny.load()
    task = make_task("custom", "train", 12, dataset_path=str(scenes_on_disk), metric="exact_match")
    samples = [task[0], task[1]]
    inputs = encode(processor, task, samples, "cpu")
    counts = (inputs["input_ids"] == processor.image_token_id).sum(1)
    assert counts.tolist() == [tiny.NUM_VISUAL_TOKENS, 2 * tiny.NUM_VISUAL_TOKENS]
    assert len(inputs["pixel_values"]) == 3
    assert torch.equal(inputs["pixel_values"][1], inputs["pixel_values"][2])


def test_a_placeholder_in_the_question(scenes_on_disk):
    _, processor = tiny.load()
    task = make_task("shape", "test", 1)
    sample = task[0]._replace(question=f"what is {tiny.IMAGE} ?")
    with pytest.raises(ValueError, match=r"shape/test/0/0: the text holds '<image>'"):
        encode(processor, task, [sample], "cpu")


def test_scenes_describe_themselves():
    task = make_task("count", "validation", 5, seed=3)
    assert task.describe() == {
        "task": "count",
        "dataset": "embedded scenes",
        "split": "validation",
        "samples": 5,
        "seed": 3,
        "metric": "exact_match",
    }
    samples = [task[i] for i in range(5)]
    assert task.corpus([s.answer for s in samples], samples) == {"accuracy": 1}
    assert set(KINDS) < set(TASKS)
