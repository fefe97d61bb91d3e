"""Eq. 5 and GAE against hand-computed cases."""

from __future__ import annotations

import pytest
import torch

from training.rewards import alphas, gae, stage_rewards


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
