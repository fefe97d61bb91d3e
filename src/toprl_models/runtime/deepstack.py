"""Features of the vision tower that a decoder adds to visual slots between its layers, on a shortened sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

from toprl_models.runtime.state import Segment, Visual, take


@dataclass(frozen=True)
class DeepStack:
    """Planes of features that the pruner adds, as the decoder knows the visual slots of the whole prompt alone.

    Source: DeepStack (Meng et al., arXiv 2406.04334). A plane has a row for each of the T visual slots of a pass.

    Attributes:
        planes: features ``[T, d]`` by the layer before which they are added.
        rows: int64 ``[B, N]``, the row of each visual slot of the prompt, T elsewhere.
    """

    planes: Mapping[int, Tensor]
    rows: Tensor

    def add(self, layer: int, hidden_states: Tensor, slots: Tensor | None) -> Tensor:
        """Add the plane before ``layer``, if there is one, to ``hidden_states`` [B, m, d] of ``slots`` [B, m]."""
        plane = self.planes.get(layer)
        if plane is None:
            return hidden_states
        rows = self.rows.to(hidden_states.device)
        rows = rows if slots is None else rows.gather(1, slots.to(rows.device))
        plane = plane.to(hidden_states.device, hidden_states.dtype)
        return hidden_states + embedding(rows, pad(plane, (0, 0, 0, 1)), padding_idx=len(plane))

    def replaced(self, values: Sequence[Tensor], visual: Visual, segment: Segment) -> DeepStack:
        """Return the planes with ``values``, a tensor [P, V, d] for each, at the visual slots of ``segment``."""
        if len(values) != len(self.planes):
            raise ValueError(f"deepstack: {len(values)} planes, but the model adds {len(self.planes)} after the stage")
        rows = self.rows.to(visual.slots.device)
        rows = rows if segment.slots is None else rows.gather(1, segment.slots)
        rows = take(rows[..., None], visual.slots, segment.packing)[..., 0]
        planes = {}
        for (layer, plane), states in zip(self.planes.items(), values, strict=True):
            states = states.flatten(0, 1)
            index = rows.masked_fill(~visual.valid, len(plane)).view(-1, 1).expand_as(states)
            whole = pad(plane.to(states.device, states.dtype), (0, 0, 0, 1))
            planes[layer] = whole.scatter(0, index, states)[:-1]
        return DeepStack(planes, self.rows)


def take_deepstack(kwargs: Mapping[str, Any], first: int) -> tuple[dict[str, Any], DeepStack | None]:
    """Take the planes that are added after a stage before layer ``first`` out of a decoder's keyword arguments.

    transformers has two forms: a list ``deepstack_visual_embeds``, added after layer 0, 1, ... where
    ``visual_pos_masks`` [B, N] is set (Qwen3-VL), and a dict ``deepstack_features``, added before the layers that are
    its keys where ``vision_mask`` [B, N, 1] is set (Granite 4 Vision). Earlier planes stay, and the decoder adds them.

    Returns:
        The arguments without these planes, and the planes, None if there are none.
    """
    kwargs = dict(kwargs)
    if kwargs.get("deepstack_visual_embeds") is not None:
        listed, visual = kwargs["deepstack_visual_embeds"], kwargs["visual_pos_masks"]
        planes = {layer + 1: listed[layer] for layer in range(first, len(listed))}
        kwargs["deepstack_visual_embeds"] = listed[:first]
    elif kwargs.get("deepstack_features") is not None:
        features, visual = kwargs["deepstack_features"], kwargs["vision_mask"][..., 0]
        planes = {layer: plane for layer, plane in features.items() if layer > first}
        kwargs["deepstack_features"] = {layer: plane for layer, plane in features.items() if layer <= first}
    else:
        return kwargs, None
    if not planes:
        return kwargs, None
    number = (visual.flatten().cumsum(0) - 1).view(visual.shape)
    return kwargs, DeepStack(planes, torch.where(visual, number, len(next(iter(planes.values())))))
