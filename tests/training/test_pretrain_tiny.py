"""Pretraining of the embedded model: packed questions are single prompts, runs resume bitwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toprl_models import tiny
from training.pretrain_tiny import PretrainConfig, Trainer, jitter_digit, main, patch_tags, pixel_values
from training.scenes import SceneDataset, ask, make_scene


def small(folder, **changes):
    values = {
        "output_dir": str(folder),
        "steps": 3,
        "vision_steps": 2,
        "last_steps": 2,
        "batch_size": 2,
        "eval_every": 2,
        "eval_size": 4,
        "bf16": False,
    }
    return PretrainConfig(**(values | changes))


def test_pixels_are_the_processors():
    trainer = Trainer(small("unused"))
    scene = SceneDataset("ocr", "train", 1)[0].scene
    wanted = trainer.processor.image_processor(scene.image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values([scene]), wanted, atol=1e-6, rtol=0)


def test_a_packed_question_is_the_one_question_prompt():
    """Same loss for a question among others as for its own prompt through the model's ordinary forward."""
    trainer = Trainer(small("unused"))
    trainer.model.eval()
    rng = np.random.default_rng(0)
    scene = make_scene(rng, "train")
    questions = [ask(rng, scene, kind)[1:] for kind in ("ocr", "shape", "exist", "count", "compare")] + [
        ask(rng, scene, "colour")[1:] for _ in range(9)
    ]
    losses = []
    with torch.no_grad():
        visual = torch.stack(list(trainer.model.model.get_image_features(pixel_values([scene])).pooler_output))
        packed = trainer._answer_loss(visual, [questions])
        for question, answer in questions:
            text = f"{tiny.prompt(question)} {answer}".replace(tiny.IMAGE, tiny.IMAGE * tiny.NUM_VISUAL_TOKENS)
            inputs = trainer.processor.tokenizer(text, return_tensors="pt")
            logits = trainer.model(input_ids=inputs["input_ids"], pixel_values=pixel_values([scene])).logits[0]
            targets = torch.tensor([trainer.vocab[answer], trainer.vocab[tiny.EOS]])
            losses.append(torch.nn.functional.cross_entropy(logits[-2:], targets))
    torch.testing.assert_close(packed, torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


def test_patch_tags_by_hand():
    scene = SceneDataset("ocr", "train", 1)[0].scene
    tags = patch_tags([scene])[0]
    assert tags[scene.digit_patch, 2] == scene.digit + 1
    assert (tags[:, 2] > 0).sum() == 1
    for patch, cell in enumerate(scene.patch_cells):
        expected = (0, 0) if cell < 0 else (scene.shapes[cell] + 1, scene.colours[cell] + 1)
        assert tuple(tags[patch, :2].tolist()) == expected


def test_a_jittered_digit_stays_on_its_patch():
    rng = np.random.default_rng(0)
    for number in range(20):
        scene = SceneDataset("ocr", "train", 20)[number].scene
        before = scene.pixels.copy()
        jitter_digit(scene, rng)
        changed = (scene.pixels != before).any(-1).reshape(8, 16, 8, 16).any((1, 3)).flatten()
        assert changed[scene.digit_patch]
        assert changed.sum() == 1
        row, column = divmod(scene.digit_patch, 8)
        place = np.s_[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16, 1]
        ink, was = 255.0 - scene.pixels[place], 255.0 - before[place]
        assert np.corrcoef(ink.flatten(), was.flatten())[0, 1] > 0.2
        assert 0.5 < ink.sum() / was.sum() < 2


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    main(small(tmp_path / "whole"))
    trainer = Trainer(small(tmp_path / "cut"))
    (tmp_path / "cut").mkdir()
    for _ in range(4):
        trainer.train_step()
    trainer.save(tmp_path / "cut")
    main(small(tmp_path / "cut", resume="auto"))
    first = torch.load(tmp_path / "whole/state.pt", weights_only=True)["model"]
    second = torch.load(tmp_path / "cut/state.pt", weights_only=True)["model"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    model, _ = tiny.load(tmp_path / "whole/checkpoint")
    assert next(model.parameters()).isfinite().all()


def test_the_shipped_configuration_is_what_the_script_builds():
    model, processor = tiny.load()
    built = Trainer(small("unused"))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in built.model.named_parameters()}
    assert processor.tokenizer.get_vocab() == built.vocab


@pytest.mark.parametrize("words", [["is", "there", "a", "circle", "?"]])
def test_unknown_words_become_unk(words):
    processor = Trainer(small("unused")).processor
    assert processor.tokenizer.unk_token_id not in processor.tokenizer(" ".join(words))["input_ids"]
    assert processor.tokenizer.unk_token_id in processor.tokenizer("is there a zebra ?")["input_ids"]
