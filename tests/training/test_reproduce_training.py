"""What the analyses need of training: reward terms, given data, clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toprl_models import TopRLPolicy, tiny
from training.analyses.clips import FRAMES, ClipTask
from training.analyses.measure import task_of
from training.ppo import PPOConfig, main
from training.rewards import stage_rewards
from training.scenes import SceneDataset
from training.tasks import answer, encode, make_task
from training.trainer.data import training_data

QUALITY, RETAINED = torch.tensor([1.0, 0.0]), torch.tensor([[0.5, 0.25], [1.0, 0.5]])
ALPHA = torch.tensor([0.9, 1.0])


def test_reward_terms_by_hand():
    def rewards(*options):
        return stage_rewards(QUALITY, RETAINED, ALPHA, *options).flatten().tolist()

    assert rewards("dense", "quality") == [1, 1, 0, 0]
    assert rewards("terminal", "quality") == [0, 1, 0, 0]
    assert rewards("dense", "retention") == pytest.approx([-0.45, -0.25, -0.9, -0.5])
    both = torch.tensor(rewards("dense", "quality")) + torch.tensor(rewards("dense", "retention"))
    torch.testing.assert_close(torch.tensor(rewards("dense")), both)
    assert rewards("dense") == rewards("dense", "both")
    with pytest.raises(ValueError, match="terms='all' must be one of"):
        rewards("dense", "all")


def small(folder, **changes) -> PPOConfig:
    values = {"iterations": 3, "rollout_size": 16, "minibatch_size": 8, "train_size": 24, "actor_size": 16}
    return PPOConfig(output_dir=str(folder), device="cpu", eval_every=0, **(values | changes))


def weights(folder):
    return TopRLPolicy.from_pretrained(folder).state_dict()


def test_reward_terms_reach_the_agent(tmp_path):
    found = {terms: weights(main(small(tmp_path / terms, reward_terms=terms))) for terms in ("both", "quality")}
    assert any(not torch.equal(found["both"][name], found["quality"][name]) for name in found["both"])


def test_given_data_train_as_the_tasks_own(tmp_path):
    own = weights(main(small(tmp_path / "own", seed=3)))
    data = training_data(*tiny.load(), make_task("ocr", "train", 24, seed=3), 16)
    given = weights(main(small(tmp_path / "given", seed=3), data))
    assert all(torch.equal(own[name], given[name]) for name in own)
    other = training_data(*tiny.load(), make_task("ocr", "train", 24, seed=4), 16)
    different = weights(main(small(tmp_path / "other", seed=3), other))
    assert any(not torch.equal(own[name], different[name]) for name in own)


def test_a_clip_shows_its_scene_in_one_frame():
    task = ClipTask("ocr", "test", 40, seed=2)
    places = []
    for i in range(len(task)):
        sample, scene = task[i], SceneDataset("ocr", "test", 40, 2)[i].scene
        shown = [np.array_equal(np.asarray(frame), scene.pixels) for frame in sample.images]
        assert len(shown) == FRAMES
        assert sum(shown) == 1
        places.append(shown.index(True))
        empty = np.asarray(sample.images[(places[-1] + 1) % FRAMES])
        cells = empty.reshape(2, 64, 2, 64, 3).transpose(0, 2, 1, 3, 4).reshape(4, -1, 3)
        assert (cells == cells[:, :1]).all()  # one colour per cell: nothing on it
        assert task[i].question == sample.question
    assert set(places) == set(range(FRAMES))


def test_the_tiny_model_finds_the_digit_in_a_clip():
    model, processor = tiny.load()
    task = task_of("clip-ocr", "test", 40, 0, None)
    samples = [task[i] for i in range(len(task))]
    inputs = encode(processor, task, samples, "cpu")
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [FRAMES * 64] * 40
    texts, quality = answer(model, processor, task, samples, inputs)
    assert quality.mean() > 0.75  # chance is 0.1
    assert task.corpus(texts, samples) == {"accuracy": pytest.approx(quality.mean().item())}
