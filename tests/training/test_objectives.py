"""The losses and gradient steps: packed against padded, several processes against one, the relaxed masks' gradient."""

from __future__ import annotations

import dataclasses
import functools
import threading
from typing import Any

import pytest
import torch

from tests.models.tiny_families import EOS_ID, FAMILY_NAMES, TINY, build_inputs, build_model
from toprl_kernels import masked_attention
from toprl_models import Schedule, TopRLPolicy, attach, masking, tiny
from training import rollout as rollout_module
from training.rollout import Rollout, SamplingPolicy, Step, evaluate_actions, rollout
from training.tasks import Sample, encode, make_task
from training.trainer.config import PPOConfig
from training.trainer.objectives import policy_loss, targets, update, value_loss
from training.trainer.packed import PackedRollout
from training.trainer.ranks import Ranks
from training.trainer.straight_through import StraightThrough
from training.trainer.teacher_forcing import answer_log_prob, pruned_log_prob

STAGES, HIDDEN, WIDTH, EPISODES = 3, 16, 8, 10
LAYERS = (1, 2, 3)


def random_policy() -> TopRLPolicy:
    """No weight is where it starts: the affine part of LayerNorm and the stage biases count."""
    torch.manual_seed(0)
    policy = TopRLPolicy(HIDDEN, list(LAYERS), WIDTH, keep_bias=0.0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return policy


def random_steps(policy: TopRLPolicy) -> list[Step]:
    """Three stages with fewer and fewer tokens; some episodes have none left, some slots are padding."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for stage, width in enumerate((9, 6, 4)):
        valid = torch.rand(EPISODES, width, generator=generator) < (0.9, 0.5, 0.3)[stage]
        step = Step(
            hidden_states=2 * torch.randn(EPISODES, width, HIDDEN, generator=generator) + 1,
            valid_mask=valid,
            keep_mask=(torch.rand(EPISODES, width, generator=generator) < 0.5) & valid,
            log_prob=torch.zeros(EPISODES, width),
            text_state=torch.randn(EPISODES, HIDDEN, generator=generator),
            kept_fraction=torch.rand(EPISODES, generator=generator),
            value=torch.zeros(EPISODES),
        )
        with torch.no_grad():
            log_prob, _, value = evaluate_actions(policy, step, stage)
        steps.append(dataclasses.replace(step, log_prob=log_prob, value=value))
    assert (steps[2].valid_mask.sum(1) == 0).any()
    return steps


def batch() -> tuple[TopRLPolicy, Rollout, torch.Tensor, torch.Tensor]:
    """Policy, episodes, advantages and returns."""
    policy = random_policy()
    generator = torch.Generator().manual_seed(2)
    advantages, returns = (torch.randn(EPISODES, STAGES, generator=generator) for _ in range(2))
    episodes = Rollout(random_steps(policy), torch.zeros(EPISODES), torch.zeros(EPISODES, STAGES), [])
    return policy, episodes, advantages, returns


def config_of(**changes: Any) -> PPOConfig:
    return PPOConfig(**({"minibatch_size": 4, "ppo_epochs": 2, "target_kl": 0.0} | changes))


def run_update(config: PPOConfig, ranks: Ranks | None = None, **changes: Any) -> tuple[TopRLPolicy, dict[str, float]]:
    """The policy after an update, and its statistics; with ``ranks`` on that process's share of the episodes."""
    policy, episodes, advantages, returns = batch()
    share = (ranks or Ranks()).share(EPISODES)
    steps = [step.select(torch.arange(EPISODES)[share]) for step in episodes.steps]
    mine = Rollout(steps, episodes.quality[share], episodes.retained[share], [])
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2, eps=1e-5)
    generator = torch.Generator().manual_seed(3)
    statistics = update(
        policy, optimizer, mine, advantages, returns, config, generator, ranks or Ranks(), **changes
    )
    return policy, statistics


def test_packed_tokens_are_the_padded_ones():
    """Values and gradients, for some of the episodes in another order."""
    rows = torch.tensor([7, 0, 4, 9, 2])
    policy = random_policy()
    steps = random_steps(policy)
    assert any((step.valid_mask[rows].sum(1) == 0).any() for step in steps)
    tokens = PackedRollout(steps).select(rows)
    log_prob, entropy = tokens.evaluate(policy)
    value = tokens.values(policy)
    parts = [evaluate_actions(policy, step.select(rows), stage) for stage, step in enumerate(steps)]
    masks = [step.valid_mask[rows] for step in steps]
    padded = [torch.cat([part[i][mask] for part, mask in zip(parts, masks, strict=True)]) for i in (0, 1)]
    padded.append(torch.cat([part[2] for part in parts]))
    for found, expected in zip((log_prob, entropy, value), padded, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens.log_prob, torch.cat([s.log_prob[rows][m] for s, m in zip(steps, masks, strict=True)]))
    gradients = []
    for results in ((log_prob, entropy, value), padded):
        generator = torch.Generator().manual_seed(4)
        total = sum((result * torch.randn(result.shape, generator=generator)).sum() for result in results)
        gradients.append(torch.autograd.grad(total, list(policy.parameters())))
    for (name, _), found, expected in zip(policy.named_parameters(), *gradients, strict=True):
        assert expected.abs().max() > 1e-3, name
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_policy_loss_by_hand():
    """An episode with two tokens, one with none and one with three."""
    log_ratio = torch.tensor([0.1, -0.6, 0.0, 0.6, -0.5])
    lengths, segment = torch.tensor([2, 0, 3]), torch.tensor([0, 0, 2, 2, 2])
    advantage = torch.tensor([1.0, 5.0, -2.0])
    ratio = log_ratio.exp()
    terms = [min(r, min(max(r, 0.8), 1.2)) for r in ratio[:2].tolist()]  # a gain is capped above
    terms += [min(-2 * r, -2 * min(max(r, 0.8), 1.2)) for r in ratio[2:].tolist()]  # a loss below
    weight = torch.tensor([0.2, 0.2, 0.2])
    loss, statistics = policy_loss(log_ratio, lengths, segment, advantage, weight, config_of(clip_range=0.2))
    assert loss.item() == pytest.approx(-sum(terms) / 5, rel=1e-5)
    assert statistics["clip_fraction"].item() == pytest.approx(3 / 5)
    assert statistics["kl_k1"].item() == pytest.approx(-log_ratio.mean().item(), rel=1e-5)
    assert statistics["kl_k3"].item() == pytest.approx((ratio - 1 - log_ratio).mean().item(), rel=1e-5)
    assert statistics["ratio_mean"].item() == pytest.approx(ratio.mean().item(), rel=1e-5)
    assert statistics["ratio_max"].item() == ratio.max().item()
    weight = torch.tensor([0.5, 0.0, 0.5])
    for level, reduce in (("mean", torch.mean), ("joint", torch.sum)):
        ratios = [reduce(log_ratio[:2]).exp().item(), reduce(log_ratio[2:]).exp().item()]
        terms = [min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in zip(ratios, (1.0, -2.0), strict=True)]
        loss, _ = policy_loss(log_ratio, lengths, segment, advantage, weight, config_of(ratio_level=level))
        assert loss.item() == pytest.approx(-sum(terms) / 2, rel=1e-5)


def test_targets_by_hand():
    """Weights of three episodes at two stages, the second episode being another process's."""
    advantages = torch.tensor([[1.0, 0.0], [2.0, 1.0], [6.0, 5.0]])
    counts = torch.tensor([[4, 2], [2, 0], [2, 0]])
    mine = torch.tensor([True, False, True])
    found = targets(advantages, 10 * advantages, counts, mine, token_level=True)
    deviation = torch.tensor([-2.0, 3.0, -2.0, 3.0]) / 7**0.5
    torch.testing.assert_close(found.advantage, deviation)
    assert found.returns.tolist() == [10, 60, 0, 50]
    assert found.token_weight.tolist() == pytest.approx([1 / 16, 1 / 16, 1 / 4, 1 / 4])
    assert torch.equal(found.ratio_weight, found.token_weight)
    assert found.row_weight.tolist() == pytest.approx([1 / 6] * 4)
    found = targets(advantages, advantages, counts, mine, token_level=False)
    assert found.ratio_weight.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 2, 0])


def test_value_loss_by_hand():
    value, old, returns = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 1.9, 0.4]), torch.tensor([3.0, 1.0, 0.0])
    assert value_loss(value, old, returns, 0.0).tolist() == pytest.approx([2.0, 0.5, 0.125])
    # the estimate of the first moved by more than 0.2: what counts is the clipped one, 0.2
    assert value_loss(value, old, returns, 0.2).tolist() == pytest.approx([0.5 * 2.8**2, 0.5, 0.125])


class ThreadRanks(Ranks):
    """Processes played by threads: they meet at a barrier, and all read what each has laid down."""

    table: dict[int, Any]
    barrier: threading.Barrier

    def exchange(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        self.barrier.wait(30)
        values = [self.table[rank] for rank in range(self.size)]
        self.barrier.wait(30)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.exchange(values)).sum(0)

    def gather(self, values: torch.Tensor, total: int) -> torch.Tensor:
        return torch.cat(self.exchange(values))

    def sum_gradients(self, parameters: Any) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        for parameter, *parts in zip(parameters, *self.exchange(gradients), strict=True):
            parameter.grad = torch.stack(parts).sum(0)


def on_threads(size: int, work: Any) -> list[Any]:
    """What ``work(ranks)`` gives, or raises, on each of ``size`` threads."""
    table: dict[int, Any] = {}
    kind = type("Played", (ThreadRanks,), {"table": table, "barrier": threading.Barrier(size)})
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(kind(rank, size))
        except RuntimeError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ratio_level": "mean", "clip_range_value": 0.1},
        {"ratio_level": "joint", "baseline": "group", "rollout_size": 128},
        {"target_kl": 1e-4},
    ],
    ids=["token", "mean_and_value_clip", "joint_and_group", "target_kl"],
)
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_train_the_policy_of_one(size, changes):
    """Minibatches of four out of ten: some hold no episode of a process of four."""
    config = config_of(**changes)
    alone, expected = run_update(config)
    for policy, statistics in on_threads(size, lambda ranks: run_update(config, ranks)):
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(policy.state_dict()[name], value, atol=1e-5, rtol=1e-5)
        assert statistics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    before = random_policy().state_dict()
    moved = {name for name, value in alone.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name in before if config.baseline == "critic" or not name.startswith("critic")}
    assert moved == trained
    assert expected["epochs"] == (1 if config.target_kl else 2)


def test_two_updates_are_bitwise_equal():
    (first, one), (second, other) = run_update(config_of()), run_update(config_of())
    assert one == other
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_a_wrong_ratio_stops_every_process(monkeypatch):
    """Only the last process has the episode whose log-probability is off."""

    def shifted(policy: TopRLPolicy) -> list[Step]:
        steps = make(policy)
        steps[1].log_prob[-1] += 0.1 * steps[1].valid_mask[-1]
        return steps

    make = random_steps
    monkeypatch.setitem(globals(), "random_steps", shifted)
    config = config_of(minibatch_size=EPISODES)
    for error in on_threads(2, lambda ranks: run_update(config, ranks)):
        assert isinstance(error, RuntimeError)
        assert "stage 1: ratio is not 1 before the first step (log gap 1.00e-01)" in str(error)
