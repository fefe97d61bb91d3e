"""Eq. 5, its variants and the advantages against hand-computed cases."""

from __future__ import annotations

import pytest
import torch

from toprl_models import Schedule
from training.rewards import (
    alphas,
    check_budget,
    gae,
    group_advantages,
    retention_term,
    reward_quality,
    stage_rewards,
    usable_samples,
)


def test_alpha_is_the_papers():
    assert alphas(3, 0.95).tolist() == pytest.approx([0.9025, 0.95, 1.0])
    assert alphas(3, 0.95, "increasing_early").tolist() == pytest.approx([1.0, 0.95, 0.9025])
    assert alphas(2, 0.5, "constant").tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="alpha_schedule='late'"):
        alphas(3, 0.95, "late")


def test_reward_by_hand():
    quality, retained = torch.tensor([1.0, 0.0]), torch.tensor([[0.5, 0.25], [1.0, 0.5]])
    alpha = torch.tensor([0.9, 1.0])
    dense = stage_rewards(quality, retained, alpha)
    assert dense.flatten().tolist() == pytest.approx([0.55, 0.75, -0.9, -0.5])
    terminal = stage_rewards(quality, retained, alpha, "terminal")
    assert terminal.flatten().tolist() == pytest.approx([-0.45, 0.75, -0.9, -0.5])
    with pytest.raises(ValueError, match="reward='sparse'"):
        stage_rewards(quality, retained, alpha, "sparse")


def test_gae_by_hand():
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, 1.0, 2.0]])
    gamma, lam = 0.9, 0.8
    delta = [1 + 0.9 * 1.0 - 0.5, 2 + 0.9 * 2.0 - 1.0, 3 - 2.0]  # the last stage is terminal
    expected = [delta[0] + 0.72 * (delta[1] + 0.72 * delta[2]), delta[1] + 0.72 * delta[2], delta[2]]
    advantages, returns = gae(rewards, values, gamma, lam)
    assert advantages[0].tolist() == pytest.approx(expected)
    assert torch.equal(returns, advantages + values)


def test_gae_limits():
    """lambda = 1 is the discounted return minus the value, lambda = 0 the one-step error."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.rand(5, 4, generator=generator), torch.rand(5, 4, generator=generator)
    discounted = torch.stack([sum(0.9 ** (j - t) * rewards[:, j] for j in range(t, 4)) for t in range(4)], 1)
    torch.testing.assert_close(gae(rewards, values, 0.9, 1.0)[1], discounted)
    following = torch.cat([values[:, 1:], torch.zeros(5, 1)], 1)
    torch.testing.assert_close(gae(rewards, values, 0.9, 0.0)[0], rewards + 0.9 * following - values)


def test_reward_quality_by_hand():
    pruned, unpruned = torch.tensor([0.5, 1.0, 0.0]), torch.tensor([1.0, 0.5, 1.0])
    assert reward_quality("ratio", pruned, unpruned).tolist() == [0.5, 2.0, 0.0]
    assert reward_quality("metric", pruned, unpruned).tolist() == [0.5, 1.0, 0.0]
    log_probs = torch.tensor([0.3, 0.9, 0.9]).log(), torch.tensor([0.6, 0.6, 1e-6]).log()
    # the last answer is all but impossible without pruning: the ratio is cut off
    assert reward_quality("prob_ratio", *log_probs).tolist() == pytest.approx([0.5, 1.5, 2.0])
    with pytest.raises(ValueError, match="reward_q='quality'"):
        reward_quality("quality", pruned, unpruned)


def test_only_the_ratio_needs_samples_that_the_unpruned_model_answers():
    quality = torch.tensor([0.5, 0.0, 1.0])
    assert usable_samples("ratio", quality).tolist() == [0, 2]
    assert usable_samples("metric", quality).tolist() == [0, 1, 2]
    assert usable_samples("prob_ratio", torch.tensor([-0.5, 0.0, -9.0])).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="reward_q='quality'"):
        usable_samples("quality", quality)


def test_the_budget_counts_tokens_as_schedules_do():
    counts = torch.tensor([[30, 20, 4], [64, 60, 2]])
    averages = [Schedule(tuple(zip((1, 2, 4), row, strict=True))).average_tokens(64, 6) for row in counts.tolist()]
    term = retention_term(counts / 64, torch.tensor([64, 64]), (1, 2, 4), 6, 20.0)
    for row, average in zip(term.tolist(), averages, strict=True):
        assert row == pytest.approx([abs(average - 20) / 20] * 3)
    assert averages[0] > 20 and averages[1] > 20
    below = retention_term(torch.zeros(1, 3), torch.tensor([64]), (1, 2, 4), 6, 20.0)
    assert below.tolist() == [pytest.approx([(20 - 64 / 6) / 20] * 3)]
    retained = torch.rand(2, 3)
    assert retention_term(retained, torch.tensor([64, 64]), (1, 2, 4), 6, 0.0) is retained


def test_an_impossible_budget_is_refused():
    for budget in (0.0, 64 / 6, 14.5, 64.0):
        check_budget(budget, 64, (1, 2, 3), 6)
    for budget in (10.0, 65.0):
        with pytest.raises(
            ValueError, match=rf"--budget {budget:g} is .*stage_layers 1 2 3: .*between 10.6667 and 64$"
        ):
            check_budget(budget, 64, (1, 2, 3), 6)


def test_group_advantages_by_hand():
    """Two samples with two episodes each: what counts is who of a pair did better from this stage on."""
    rewards = torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 5.0], [5.0, 5.0]])
    advantages, returns = group_advantages(rewards, gamma=0.5, group_size=2)
    assert returns.tolist() == [[2.0, 2.0], [3.0, 0.0], [7.5, 5.0], [7.5, 5.0]]
    assert advantages.tolist() == [[-0.5, 1.0], [0.5, -1.0], [0.0, 0.0], [0.0, 0.0]]
