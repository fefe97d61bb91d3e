"""The losses and gradient steps: packed against padded, several processes against one."""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
from typing import Any

import pytest
import torch

from toprl_kernels import keep_mask_log_prob
from toprl_models import TopRLPolicy
from training.rollout import Rollout, Step
from training.trainer.config import PPOConfig
from training.trainer.objectives import policy_loss, targets, update, value_loss
from training.trainer.packed import PackedRollout
from training.trainer.ranks import Ranks

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


def select(step: Step, rows: torch.Tensor) -> Step:
    return Step(**{field.name: getattr(step, field.name)[rows] for field in dataclasses.fields(Step)})


def evaluate(policy: TopRLPolicy, step: Step, stage: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition: log-probability and entropy ``[B, V]`` of the recorded actions, and value ``[B]``."""
    logits = policy.logits(step.hidden_states, stage, step.valid_mask)
    log_prob, entropy = keep_mask_log_prob(logits, step.keep_mask, previous_mask=step.valid_mask)
    return (
        log_prob,
        entropy,
        policy.value(step.hidden_states, stage, step.valid_mask, step.text_state, step.kept_fraction),
    )


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
            log_prob, _, value = evaluate(policy, step, stage)
        steps.append(dataclasses.replace(step, log_prob=log_prob, value=value))
    assert (steps[2].valid_mask.sum(1) == 0).any()
    return steps


@functools.cache  # threads share torch's generator, which the policy is drawn from
def acting() -> tuple[TopRLPolicy, list[Step]]:
    policy = random_policy()
    return policy, random_steps(policy)


def config_of(**changes: Any) -> PPOConfig:
    return PPOConfig(**({"minibatch_size": 4, "ppo_epochs": 2, "target_kl": 0.0} | changes))


def run_update(
    config: PPOConfig, ranks: Ranks | None = None, steps: list[Step] | None = None
) -> tuple[TopRLPolicy, dict[str, float]]:
    """The policy after an update, and its statistics; with ``ranks`` on that process's share of the episodes."""
    policy, ranks = copy.deepcopy(acting()[0]), ranks or Ranks()
    share = torch.arange(EPISODES)[ranks.share(EPISODES)]
    mine = [select(step, share) for step in steps or acting()[1]]
    generator = torch.Generator().manual_seed(2)
    advantages, returns = (torch.randn(EPISODES, STAGES, generator=generator) for _ in range(2))
    episodes = Rollout(mine, torch.zeros(len(share)), torch.zeros(len(share), STAGES), torch.zeros(len(share)), [])
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2, eps=1e-5)
    return policy, update(policy, optimizer, episodes, advantages, returns, config, generator, ranks)


def test_packed_tokens_are_the_padded_ones():
    """Values and gradients, for some of the episodes in another order."""
    rows = torch.tensor([7, 0, 4, 9, 2])
    policy, steps = acting()
    assert any((step.valid_mask[rows].sum(1) == 0).any() for step in steps)
    tokens = PackedRollout(steps).select(rows)
    log_prob, entropy = tokens.evaluate(policy)
    value = tokens.values(policy)
    parts = [evaluate(policy, select(step, rows), stage) for stage, step in enumerate(steps)]
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
    value, old, returns = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.9, 1.0]), torch.tensor([3.0, 1.0, 1.0])
    assert value_loss(value, old, returns, 0.0).tolist() == pytest.approx([2.0, 0.5, 2.0])
    # the first and the last moved by more than 0.2; the larger of the two errors counts
    assert value_loss(value, old, returns, 0.2).tolist() == pytest.approx([0.5 * 2.8**2, 0.5, 2.0])


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
@pytest.mark.parametrize("size", [2, EPISODES])
def test_several_processes_train_the_policy_of_one(size, changes):
    """Minibatches of four out of ten: with a process for each episode, most processes have none in a minibatch."""
    config = config_of(**changes)
    alone, expected = run_update(config)
    for policy, statistics in on_threads(size, lambda ranks: run_update(config, ranks)):
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(policy.state_dict()[name], value, atol=1e-5, rtol=1e-5)
        assert statistics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    before = acting()[0].state_dict()
    moved = {name for name, value in alone.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name in before if config.baseline == "critic" or not name.startswith("critic")}
    assert moved == trained
    assert expected["epochs"] == (1 if config.target_kl else 2)


def test_two_updates_are_bitwise_equal():
    (first, one), (second, other) = run_update(config_of()), run_update(config_of())
    assert one == other
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize(("objective", "calls"), [("straight_through", 3), ("hybrid", 3)])
def test_the_task_loss_is_in_the_first_pass(objective, calls):
    """Ten episodes in minibatches of four, and two passes of PPO."""
    seen = []

    def task_loss(rows: torch.Tensor, size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        seen.append((len(rows), size))
        loss = policy.head.bias[0] * len(rows) / size
        return loss, {"answer_loss": torch.tensor(len(rows) / size), "relaxed_retention": torch.tensor(0.5)}

    config = config_of(objective=objective, straight_through_coef=100.0, max_grad_norm=1e9, learning_rate=1.0)
    policy, steps = copy.deepcopy(acting()[0]), acting()[1]
    before = copy.deepcopy(policy.state_dict())
    episodes = Rollout(steps, torch.zeros(EPISODES), torch.zeros(EPISODES, STAGES), torch.zeros(EPISODES), [])
    zeros = torch.zeros(EPISODES, STAGES)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0 if objective == "straight_through" else 0.01)
    statistics = update(
        policy, optimizer, episodes, zeros, zeros, config, torch.Generator().manual_seed(0), task_loss=task_loss
    )
    assert seen == [(4, 4), (4, 4), (2, 2)] and len(seen) == calls
    assert statistics["answer_loss"] == 1.0 and statistics["relaxed_retention"] == 0.5
    moved = (before["head.bias"] - policy.head.bias.detach())[0].item()
    assert moved == pytest.approx(3.0, abs=1e-5 if objective == "straight_through" else 0.02)
    if objective == "straight_through":
        assert statistics["epochs"] == 1 and statistics["kl_k3"] > 0  # from the second minibatch on
        others = [n for n, p in policy.named_parameters() if n != "head.bias" and not torch.equal(p, before[n])]
        assert not others
    else:
        assert statistics["epochs"] == 2 and statistics["ratio_max"] > 1


def test_a_wrong_ratio_stops_every_process():
    """Only the last process has the episode whose log-probability is off."""
    steps = [dataclasses.replace(step, log_prob=step.log_prob.clone()) for step in acting()[1]]
    assert steps[1].valid_mask[-1].any()
    steps[1].log_prob[-1] += 0.1 * steps[1].valid_mask[-1]
    config = config_of(minibatch_size=EPISODES)
    for error in on_threads(2, lambda ranks: run_update(config, ranks, steps)):
        assert isinstance(error, RuntimeError)
        assert "stage 1: ratio is not 1 before the first step (log gap 1.00e-01)" in str(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "dpo"}, "--objective dpo must be one of ppo, straight_through, hybrid"),
        ({"baseline": "mean"}, "--baseline mean must be one of critic, group"),
        ({"reward_q": "f1"}, "--reward_q f1 must be one of ratio, prob_ratio, metric"),
        ({"baseline": "group", "group_size": 1}, "--group_size 1 must be at least 2"),
        ({"baseline": "group", "group_size": 5}, "--group_size 5 must .* divide --rollout_size 128"),
        ({"budget": -1.0}, "--budget -1.0 must be 0 or more"),
        ({"budget": 20.0, "reward_terms": "quality"}, "--budget 20 has no meaning with --reward_terms quality"),
        ({"retention_coef": -0.5}, "--retention_coef -0.5 must be 0 or more"),
    ],
)
def test_flags_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**changes)
