"""Differences between the supported releases of transformers; all other code runs on each of them."""

from __future__ import annotations

from torch import nn


def repeats_hooks(layer: type[nn.Module]) -> bool:
    """Tell whether gradient checkpointing runs the hooks of ``layer`` again in the backward pass.

    Releases before 5.23 checkpoint ``__call__``, hooks included, instead of ``forward``.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    return issubclass(layer, GradientCheckpointingLayer) and "__call__" in vars(GradientCheckpointingLayer)
