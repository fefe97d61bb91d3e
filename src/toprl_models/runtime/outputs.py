"""Outputs for the caller: states at the prompt's length, and a loss without the dropped tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from toprl_models.runtime.state import ForwardPass


@dataclass
class Survivors:
    """The tokens of one forward pass that reached the last layer, padding excluded."""

    length: int
    slots: Tensor  # [B, m], ``length`` where a row is shorter

    def dropped(self) -> Tensor:
        """Mark the tokens that were dropped, bool ``[B, N]``; padding counts as dropped."""
        kept = torch.zeros(len(self.slots), self.length + 1, dtype=torch.bool, device=self.slots.device)
        return ~kept.scatter(1, self.slots, True)[:, : self.length]


def slots_of(forward: ForwardPass, number: int) -> Tensor | None:
    """Return the prompt slots that segment ``number`` holds, ``forward.length`` for padding; None means all."""
    segment = forward.segments.get(number)
    if segment is None or segment.slots is None:
        return None
    return segment.slots if segment.valid is None else segment.slots.masked_fill(~segment.valid, forward.length)


def scatter_back(states: Tensor, slots: Tensor | None, length: int) -> Tensor:
    """Put states [B, m, d] at their places in a sequence of ``length``, zeros elsewhere."""
    if slots is None:
        return states
    full = states.new_zeros(len(states), length + 1, states.shape[-1])
    slots = slots.to(states.device)
    return full.scatter(1, slots[..., None].expand_as(states), states)[:, :length]


def scatter_all(
    states: tuple[Tensor | None, ...], forward: ForwardPass, stage_layers: tuple[int, ...], num_layers: int
) -> tuple[Tensor | None, ...]:
    """Bring each entry of transformers' ``hidden_states`` to the length of the prompt.

    The last entry left the last layer; a selection of entries may lack the first, the embeddings that entered layer 0.
    """
    first = num_layers - len(states)
    numbers = [sum(layer <= max(0, first + i) for layer in stage_layers) for i in range(len(states))]
    return tuple(
        state if state is None else scatter_back(state, slots_of(forward, number), forward.length)
        for state, number in zip(states, numbers, strict=True)
    )


def without_dropped(dropped: Tensor, labels: Tensor | None, *, shifted: bool = False) -> Tensor | None:
    """Set labels [B, N] to -100 for dropped tokens and for what would be predicted from a dropped token.

    ``labels[:, i + 1]`` is predicted from token i; ``labels[:, i]`` if ``shifted`` (transformers' ``shift_labels``).
    """
    if labels is None:
        return None
    if labels.shape != dropped.shape:
        raise ValueError(
            f"labels: shape {tuple(labels.shape)} is not the prompt's {tuple(dropped.shape)}: while a Pruner is "
            "attached, give a label to every token (-100 for none) and leave logits_to_keep at 0"
        )
    dropped = dropped.to(labels.device)
    neighbour = pad(dropped[:, 1:], (0, 1)) if shifted else pad(dropped[:, :-1], (1, 0))
    return labels.masked_fill(dropped | neighbour, -100)
