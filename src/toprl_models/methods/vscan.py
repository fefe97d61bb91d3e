"""VScan (Zhang et al., arXiv 2505.22654, "VScan: Rethinking Visual Token Reduction ...")."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from toprl_models.methods._layout import image_tower, read_layer
from toprl_models.methods._tiles import LayersPolicy, Tile, kept_with, layer_at
from toprl_models.methods._tower import KEPT, after_first_layers, check_merging, mean_attention, sequences
from toprl_models.methods.pyramiddrop import PyramidDrop
from toprl_models.policy import Decision, Policy, StageContext
from toprl_models.registry import register_method
from toprl_models.runtime.scores import Observation

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from toprl_models.schedule import Schedule


class Scan(LayersPolicy):
    """The first stage of VScan, before layer 0: a scan of windows and one of the whole picture.

    Half of the tokens, rounded down, come from ``windows`` x ``windows`` windows of the tile, as many from each: those
    with most attention of the class token in the 6th of 24 layers of the tower. The rest have most attention in the
    layer whose output the projector gets. Each dropped token is merged into the kept one with the largest cosine: a
    kept token becomes the mean of itself and those that joined it, behind the projector.
    """

    def __init__(self, windows: int, local_ratio: float) -> None:
        self.windows, self.local_ratio = windows, local_ratio

    def layers(self, model: PreTrainedModel) -> list[nn.Module]:
        return [layer_at(model, 6 / 24), read_layer(model.config, image_tower(model))]

    def read(self, calls: Sequence[Observation], has_class_token: bool) -> Tensor:
        """Return the attention of the class token, or without one that of all patches, ``[N, 1]``."""
        parts = itertools.chain.from_iterable(map(sequences, calls))
        first = int(has_class_token)
        return torch.cat([mean_attention(part, has_class_token)[:, first:].flatten() for part in parts])[:, None]

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        super().check(model, schedule)
        check_merging(self, schedule)

    def decide(self, context: StageContext) -> Decision:
        reading, tiles = self._reader.read_layers(self, context)
        scores, states = reading.scores.clone(), context.hidden_states[:: reading.repeats].clone()
        for slots, tile, keep in tiles:
            chosen = slots
            if keep < len(slots):
                picks = self.choose(tile, keep)
                chosen = slots[picks]
                states.view(-1, states.shape[-1])[chosen] = joined(tile.projected, picks).to(states.dtype)
            scores.view(-1)[chosen] += KEPT
        return kept_with(scores, states, reading)

    def choose(self, tile: Tile, keep: int) -> Tensor:
        shallow, deep = tile.extra.unbind(1)
        rows, columns = tile.grid
        row, column = tile.places // columns, tile.places % columns
        window = row * self.windows // rows * self.windows + column * self.windows // columns
        each = int(keep * self.local_ratio) // self.windows**2
        order = shallow.argsort(descending=True, stable=True)
        local = [order[window[order] == number][:each] for number in range(self.windows**2)]
        first = torch.cat(local)
        rest = deep.index_fill(0, first, -torch.inf).topk(keep - len(first)).indices
        return torch.cat([first, rest])


def joined(states: Tensor, kept: Tensor) -> Tensor:
    """Average each of the ``kept`` [k] tokens with those that are most like it: ``[k, d]``, in float32 at least."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    unit = normalize(states, dim=-1)
    dropped = torch.ones(len(states), dtype=torch.bool, device=states.device).index_fill(0, kept, False)
    target = (unit[dropped] @ unit[kept].T).argmax(1)
    sums = states[kept].index_add(0, target, states[dropped])
    return sums / (1 + target.bincount(minlength=len(kept)))[:, None]


@register_method("vscan", "VScan", "arXiv 2505.22654", stages=(0, 16), refuses=after_first_layers, inputs=("images",))
class VScan(Policy):
    """Scan the picture before layer 0, globally and in windows, and prune again in the middle of the decoder.

    The first stage is ``Scan``. The second one, before layer 16 of 32, keeps the tokens whose keys match the last
    prompt token's query best, as ``PyramidDrop`` does. The authors keep 192, 128 and 64 tokens on average.

    Deviations: windows are 4 x 4 for tiles of any shape, the authors' are 6 x 6 tokens of 24 x 24. Without a class
    token attention is that of all patches, of merged patches the mean; in a tower with windows of its own the shallow
    layer is the nearest one that attends to all. Attention and cosines are in float32, theirs in the model's precision.

    One instance serves one attached model at a time.

    Args:
        windows: windows of a tile along each side.
        local_ratio: share of the tokens that come from windows.

    Raises:
        ValueError: ``windows`` below 1, ``local_ratio`` outside [0, 1]; by ``attach``, another schedule than two stages
            of which the first is at layer 0, or a model whose tower cannot be read; in the forward pass, for videos and
            for pictures that were encoded ahead of time.
    """

    positions = "renumbered"
    attention_from = "current"

    def __init__(self, windows: int = 4, local_ratio: float = 0.5) -> None:
        if windows < 1:
            raise ValueError(f"windows={windows} must be at least 1")
        if not 0 <= local_ratio <= 1:
            raise ValueError(f"local_ratio={local_ratio} must be in [0, 1]")
        self._stages: tuple[Policy, Policy] = (Scan(windows, local_ratio), PyramidDrop())

    def at_stage(self, stage: int) -> Policy:
        return self._stages[stage]

    def decide(self, context: StageContext) -> Decision:
        return self.at_stage(context.stage).decide(context)

    def hooks(self, model: PreTrainedModel) -> list[RemovableHandle]:
        return self._stages[0].hooks(model)

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        if len(schedule) != 2 or schedule.layers[0]:
            raise ValueError(
                f"schedule: stages before layers {schedule.layers}, but VScan prunes before the language model and "
                "once inside it: Schedule(((0, keep), (16, keep)))"
            )
        self._stages[0].check(model, replace(schedule, stages=schedule.stages[:1]))
