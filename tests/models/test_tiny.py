"""The embedded model: ships whole, loads offline, answers."""

from __future__ import annotations

import pytest
import torch

from toprl_models import tiny
from training.scenes import KINDS, vocabulary
from training.tasks import answer, encode, make_task

# What README states, less a margin of about two standard errors at 300 samples.
LEAST = {"ocr": 0.87, "shape": 0.87, "colour": 0.87, "exist": 0.87, "count": 0.76, "compare": 0.76}


def test_the_checkpoint_is_small_and_whole():
    size = sum(file.stat().st_size for file in tiny.CHECKPOINT.iterdir())
    assert size < 4 * 2**20
    model, processor = tiny.load()
    assert model.dtype == torch.float32
    assert not any(p.requires_grad for p in model.parameters())
    assert processor.tokenizer.get_vocab().keys() >= set(vocabulary())
    assert processor.tokenizer.convert_tokens_to_ids(tiny.UNK) != processor.tokenizer.convert_tokens_to_ids("red")


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_on_unseen_source_images(kind):
    model, processor = tiny.load()
    task = make_task(kind, "test", 300, seed=2)
    samples = [task[i] for i in range(300)]
    right = answer(model, processor, task, samples, encode(processor, task, samples, "cpu"))[1]
    assert right.mean() >= LEAST[kind]


def test_the_chat_template_gives_the_prompt():
    _, processor = tiny.load()
    content = [{"type": "image"}, {"type": "text", "text": "is there a circle ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == tiny.prompt("is there a circle ?")


def test_random_models_of_one_seed_are_equal():
    first, second = tiny.build_model(60, seed=1), tiny.build_model(60, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_folder_without_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        tiny.load(tmp_path)
