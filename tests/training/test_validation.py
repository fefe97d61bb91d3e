"""Held-out samples: which ones, what is measured on them, and that training does not notice."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from toprl_models import Schedule, TopRLPolicy, attach, tiny
from training.rollout import ArgmaxPolicy
from training.tasks import answer, make_task
from training.trainer import validation
from training.trainer.config import PPOConfig
from training.trainer.data import TrainingData, training_data
from training.trainer.ranks import Ranks
from training.trainer.validation import split_off, topk_schedule, validate, validation_task

LAYERS = [1, 2, 3]
SCHEDULE = Schedule(tuple((layer, 1.0) for layer in LAYERS))
CONFIG = PPOConfig(stage_layers=LAYERS, rollout_size=16, eval_size=24)


@pytest.fixture(scope="module")
def model_and_processor():
    return tiny.load()


@pytest.fixture(scope="module")
def held_out(model_and_processor):
    task = validation_task(CONFIG)
    assert task is not None
    return training_data(*model_and_processor, task, 16)


@pytest.fixture
def policy():
    """Keeps some and drops some."""
    policy = TopRLPolicy(tiny.HIDDEN_SIZE, LAYERS, 16, keep_bias=0.0)
    with torch.no_grad():
        policy.head.weight.mul_(100)
    return policy


@pytest.mark.parametrize("mode", ["compact", "mask"])
def test_it_measures_what_the_policy_does(model_and_processor, held_out, policy, mode):
    model, processor = model_and_processor
    config = dataclasses.replace(CONFIG, rollout=mode)
    row = validate(model, processor, policy, SCHEDULE, held_out, config, Ranks())
    inputs = held_out.inputs(model, processor, list(range(24)))
    with attach(model, ArgmaxPolicy(policy), schedule=SCHEDULE) as pruner:
        _, quality = answer(model, processor, held_out.task, held_out.samples, inputs)
        retained = torch.tensor([stage.counts for stage in pruner.trace]).T / 64
    assert 0 < retained.mean() < 1
    assert row["accuracy"] == pytest.approx(quality.mean().item())
    assert row["retained"] == pytest.approx(retained.mean(0).tolist())
    # Eq. 5 by hand: r_t = Q_p / Q - eta^(T-t) L_t / L
    right = held_out.quality > 0
    reward = sum((quality - 0.95 ** (2 - t) * retained[:, t])[right].mean().item() for t in range(3))
    assert row["reward"] == pytest.approx(reward, abs=1e-5)
    # with a budget: how far the average over the six layers is from it
    budget = validate(model, processor, policy, SCHEDULE, held_out, dataclasses.replace(config, budget=20.0), Ranks())
    average = 64 * (1 + retained[:, 0] + retained[:, 1] + 3 * retained[:, 2]) / 6
    reward = (3 * quality - (0.9025 + 0.95 + 1) * (average - 20).abs() / 20)[right].mean().item()
    assert budget["reward"] == pytest.approx(reward, abs=1e-4)
    assert row["full_accuracy"] == pytest.approx(held_out.quality.mean().item())
    schedule = Schedule(((1, 8), (2, 4), (3, 2)))
    assert topk_schedule(config).counts(64) == schedule.counts(64)
    with attach(model, policy, schedule=schedule):
        _, quality = answer(model, processor, held_out.task, held_out.samples, inputs)
    assert row["topk_accuracy"] == pytest.approx(quality.mean().item())
    assert row["topk_retained"] == [8 / 64, 4 / 64, 2 / 64]
    assert json.loads(json.dumps(row)) == row and row["seconds"] > 0


def test_training_does_not_notice(model_and_processor, held_out, policy):
    model, processor = model_and_processor
    before, weights = torch.get_rng_state(), {n: w.clone() for n, w in policy.state_dict().items()}
    first = validate(model, processor, policy, SCHEDULE, held_out, CONFIG, Ranks())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weights[name], weight) for name, weight in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())
    again = validate(model, processor, policy, SCHEDULE, held_out, CONFIG, Ranks())
    assert first | {"seconds": 0} == again | {"seconds": 0}


@dataclasses.dataclass(frozen=True)
class Recording(Ranks):
    """A process that is told nothing by the others; ``blocks`` are what it would tell them."""

    blocks: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def gather(self, values, total):
        self.blocks.append(values)
        table = values.new_zeros(total, values.shape[1])
        table[self.share(total)] = values
        return table


def test_each_process_answers_its_share(model_and_processor, held_out, policy):
    alone, *three = processes = [Recording(0, 1), *(Recording(rank, 3) for rank in range(3))]
    for ranks in processes:
        validate(*model_and_processor, policy, SCHEDULE, held_out, CONFIG, ranks)
    for whole, *parts in zip(*(ranks.blocks for ranks in (alone, *three)), strict=True):
        assert [len(part) for part in parts] == [8, 8, 8]
        assert torch.equal(torch.cat(parts), whole)


def test_samples_without_a_reward_are_refused(model_and_processor, held_out, policy):
    data = dataclasses.replace(held_out, quality=torch.zeros(24))
    with pytest.raises(ValueError, match="--eval_size 24: the unpruned model answers none of the 24"):
        validate(*model_and_processor, policy, SCHEDULE, data, CONFIG, Ranks())
    for reward_q in ("metric", "prob_ratio"):  # Q does not matter then
        config = dataclasses.replace(CONFIG, reward_q=reward_q)
        row = validate(*model_and_processor, policy, SCHEDULE, data, config, Ranks())
        other = validate(*model_and_processor, policy, SCHEDULE, held_out, config, Ranks())
        assert row["reward"] == other["reward"]


@pytest.mark.parametrize("number", [5, 24, 100, 1001])
@pytest.mark.parametrize("size", [1, 3, 64])
def test_samples_that_are_split_off(number, size):
    samples = list(range(number))
    data = TrainingData(None, samples, torch.arange(number, dtype=torch.float32))  # type: ignore[arg-type]
    training, held_out = split_off(data, size)
    assert len(held_out.samples) == min(size, number // 5)
    assert sorted(training.samples + held_out.samples) == samples
    for part in (training, held_out):
        assert part.quality.tolist() == part.samples
    gaps = torch.tensor([0, *held_out.samples, number]).diff()
    assert gaps.max() <= 2 * number / len(held_out.samples)
    assert split_off(data, size)[1].samples == held_out.samples


def test_too_few_samples_to_split():
    with pytest.raises(ValueError, match=r"4 training samples are too few.*--eval_every 0"):
        split_off(TrainingData(None, [1, 2, 3, 4], torch.ones(4)), 1)  # type: ignore[arg-type, list-item]


@pytest.mark.parametrize(
    ("keep", "counts"), [([], (8, 4, 2)), ([0.5, 0.25, 0.25], (32, 16, 16)), ([1, 1, 0], (64, 64, 0))]
)
def test_shares_of_topk(keep, counts):
    assert topk_schedule(dataclasses.replace(CONFIG, eval_keep=keep)).counts(64) == counts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"eval_keep": [0.5]}, "one share per stage"),
        ({"eval_keep": [0.5, 0.6, 0.1]}, "never grow"),
        ({"eval_keep": [8, 4, 2]}, r"lie in \[0, 1\]"),
        ({"eval_every": -1}, "--eval_every -1 must be 0"),
        ({"eval_size": 0}, "--eval_size 0 must be at least 1"),
        ({"keep_checkpoints": 0}, "--keep_checkpoints 0 must be at least 1"),
        ({"on_collapse": "panic"}, "--on_collapse panic must be one of warn, stop, ignore"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **flags)


def test_the_validation_split_of_a_task(tmp_path, monkeypatch):
    """Never the samples that are trained on or reported; the same for all seeds."""
    task = validation_task(CONFIG)
    assert task is not None
    samples = [task[i] for i in range(len(task))]
    assert len(samples) == 24 and all(sample.key.startswith("ocr/validation/") for sample in samples)
    other = validation_task(dataclasses.replace(CONFIG, seed=3))
    assert other is not None and other[5].image.tobytes() == samples[5].image.tobytes()
    for split in ("train", "test"):
        known = make_task("ocr", split, 200)
        images = {known[i].image.tobytes() for i in range(200)}
        assert not images & {sample.image.tobytes() for sample in samples}
    # textvqa reports its validation split
    for name in ("textvqa", "pope"):
        assert validation_task(dataclasses.replace(CONFIG, task=name)) is None
    with monkeypatch.context() as patch:
        patch.setattr(validation, "make_task", lambda *arguments: arguments)
        for name, split in {"gqa": "val", "scienceqa": "validation"}.items():
            assert validation_task(dataclasses.replace(CONFIG, task=name)) == (name, split, 24)
    samples[0].image.save(tmp_path / "0.png")
    row = json.dumps({"image": "0.png", "question": "Which?", "answer": "3"}) + "\n"
    (tmp_path / "train.jsonl").write_text(row)
    own = dataclasses.replace(CONFIG, task="custom", metric="exact_match", dataset_path=str(tmp_path / "train.jsonl"))
    assert validation_task(own) is None
    own.dataset_path = str(tmp_path)
    assert validation_task(own) is None
    (tmp_path / "validation.jsonl").write_text(row * 3)
    task = validation_task(own)
    assert task is not None and len(task) == 3 and task[0].key.startswith("custom/validation/")
