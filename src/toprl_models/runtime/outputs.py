"""What callers get back: states at the prompt's length, and a loss without the dropped tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from toprl_models.runtime.stage import ForwardPass, composed_indices


@dataclass
class Survivors:
    """The tokens of one forward pass that reached the last layer, padding excluded."""

    length: int
    slots: Tensor  # [B, m], ``length`` where a row is shorter

    @classmethod
    def of(cls, forward: ForwardPass) -> Survivors | None:
        """After the last layer; None when all tokens survived."""
        number = max(forward.segments, default=0)  # fewer than the schedule has if the model stops early
        if not number:
            return None
        segment = forward.segments[number]
        if segment.keep_mask is not None:
            kept = segment.keep_mask.detach() > 0
            kept = kept if forward.valid is None else kept & forward.valid
            everything = torch.arange(forward.length, device=kept.device)
            return cls(forward.length, everything.where(kept, forward.length))
        slots = slots_of(forward, number)
        return None if slots is None else cls(forward.length, slots)

    def dropped(self) -> Tensor:
        """bool [B, N]."""
        kept = torch.zeros(len(self.slots), self.length + 1, dtype=torch.bool, device=self.slots.device)
        return ~kept.scatter(1, self.slots, True)[:, : self.length]


def slots_of(forward: ForwardPass, number: int) -> Tensor | None:
    """Slots of the prompt that segment ``number`` holds, one too many for its padding; None for all."""
    composed = composed_indices(forward, number)
    if composed is None:
        return None
    valid = forward.segments[number].valid
    return composed if valid is None else composed.masked_fill(~valid, forward.length)


def scatter_back(states: Tensor, slots: Tensor | None, length: int) -> Tensor:
    """States [B, m, d] at their places in a sequence of ``length``, zeros elsewhere."""
    if slots is None:
        return states
    full = states.new_zeros(len(states), length + 1, states.shape[-1])
    return full.scatter(1, slots[..., None].expand_as(states), states)[:, :length]


def scatter_all(
    states: tuple[Tensor | None, ...], forward: ForwardPass, stage_layers: tuple[int, ...], num_layers: int
) -> tuple[Tensor | None, ...]:
    """``hidden_states`` of transformers, each entry at the length of the prompt.

    The last entry left the last layer; a selection of some may lack the first, the embeddings, which are what layer 0
    was given.
    """
    first = num_layers - len(states)
    numbers = [sum(layer <= max(0, first + i) for layer in stage_layers) for i in range(len(states))]
    return tuple(
        one if one is None else scatter_back(one, slots_of(forward, number), forward.length)
        for one, number in zip(states, numbers, strict=True)
    )


def without_dropped(dropped: Tensor, labels: Tensor | None, *, shifted: bool = False) -> Tensor | None:
    """Labels [B, N] with -100 for dropped tokens and for what would be predicted from one.

    Args:
        dropped: bool [B, N].
        labels: ``labels[:, i + 1]`` is predicted from token i, or ``labels[:, i]`` if ``shifted``.
        shifted: they are transformers' ``shift_labels``.

    Raises:
        ValueError: the labels have another shape than the prompt.
    """
    if labels is None:
        return None
    if labels.shape != dropped.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, the prompt {tuple(dropped.shape)}: while a Pruner is attached, "
            "give a label to every token (-100 for none) and leave logits_to_keep at 0"
        )
    dropped = dropped.to(labels.device)
    neighbour = pad(dropped[:, 1:], (0, 1)) if shifted else pad(dropped[:, :-1], (1, 0))
    return labels.masked_fill(dropped | neighbour, -100)
