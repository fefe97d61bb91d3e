"""The actor's parameters as plain tensors, so that the op does not depend on any module class."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

LAYER_NORM_EPS = 1e-5


class ActorWeights(NamedTuple):
    """Parameters of :func:`toprl_kernels.actor_score`; d1 = hidden size of the model, d2 = width, T = stages."""

    norm_weight: Tensor  # [d1]
    norm_bias: Tensor  # [d1]
    stage_bias: Tensor  # [T, d2]
    fc1_weight: Tensor  # [d2, d1]
    fc1_bias: Tensor  # [d2]
    fc2_weight: Tensor  # [d2, d2]
    fc2_bias: Tensor  # [d2]
    fc3_weight: Tensor  # [d2, d2]
    fc3_bias: Tensor  # [d2]
    head_weight: Tensor  # [2, d2]
    head_bias: Tensor  # [2]
