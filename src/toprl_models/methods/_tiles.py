"""Base of methods that choose the tokens of a picture, or tile, by what the vision tower made of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toprl_models.methods._layout import image_tower, layers_of, read_layer
from toprl_models.methods._tower import (
    KEPT,
    TowerPolicy,
    TowerReader,
    TowerReading,
    check_before_llm,
    check_tower,
    watch_attention,
)
from toprl_models.policy import Decision, Policy, StageContext
from toprl_models.runtime.scores import Observation, attention_of

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from toprl_models.schedule import Schedule


@dataclass(frozen=True)
class Tile:
    """A picture, or a tile of one, as n visual tokens.

    Attributes:
        scores: ``[n]``, the attention of ``TowerReading.scores``.
        states: ``[n, d]``, states of the tower where a patch is a token and there is a class token, else ``projected``.
        projected: ``[n, d]``, what the language model gets.
        extra: ``[n, c]``, what the policy read of other layers.
        places: int64 ``[n]``, row * columns + column in the tile; the model may have left out tokens. Without other
            layers, numbers from 0.
        grid: rows and columns of the tile; (1, n) without other layers.
    """

    scores: Tensor
    states: Tensor
    projected: Tensor
    extra: Tensor
    places: Tensor
    grid: tuple[int, int]


class TilePolicy(TowerPolicy):
    """Base of methods that choose tokens tile by tile: override ``choose``.

    The tokens of a row are shared among its tiles by ``tile_shares``, in proportion to the tokens that the tower made
    of each. Newline features go first, and stay only where there are more tokens to keep than patches.
    """

    @abstractmethod
    def choose(self, tile: Tile, keep: int) -> Tensor:
        """Choose 1 <= ``keep`` < n tokens of a tile: int64 ``[keep]``."""

    def score(self, context: StageContext) -> Tensor:
        """Score by attention, float32 ``[B, V]``; 2 more for what a tile keeps, -1 for newlines and padding."""
        reading = self._reader.read(self, context)
        return scores_of(self, reading, tiles_of(reading, context))


class LayersPolicy(Policy):
    """Base of methods that read several layers of the tower: override ``layers``, ``read`` and ``choose``.

    As ``TilePolicy``; the shape of a tile is known. One instance serves one attached model at a time.
    """

    positions = "renumbered"
    uses_text = False

    @abstractmethod
    def layers(self, model: PreTrainedModel) -> list[nn.Module]:
        """Name the layers of the tower that are read."""

    @abstractmethod
    def read(self, calls: Sequence[Observation], has_class_token: bool) -> Tensor:
        """Return ``[N, c]`` of the N patches in the attention calls of one layer."""

    @abstractmethod
    def choose(self, tile: Tile, keep: int) -> Tensor:
        """Choose 1 <= ``keep`` < n tokens of a tile: int64 ``[keep]``."""

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        check_before_llm(self, schedule)
        check_tower(model)
        self.layers(model)

    def hooks(self, model: PreTrainedModel) -> list[RemovableHandle]:
        self._reader = LayersReader(model, self)
        return self._reader.handles

    def score(self, context: StageContext) -> Tensor:
        """Score by attention, float32 ``[B, V]``; 2 more for what a tile keeps, -1 for newlines and padding."""
        return scores_of(self, *self._reader.read_layers(self, context))


class LayersReader(TowerReader):
    """Reader of further layers of a tower, and of each token's place in its tile."""

    def __init__(self, model: PreTrainedModel, policy: LayersPolicy) -> None:
        super().__init__(model)
        self._names: list[str] = []
        self._read = policy.read
        self._grids: list[tuple[int, int]] = []
        self._number = 0  # columns that were read of further layers
        usual = read_layer(model.config, image_tower(model))
        for number, layer in enumerate(policy.layers(model)):
            self._names.append("calls" if layer is usual else f"calls {number}")
            if layer is not usual:
                watch_attention(attention_of(layer), self._recorder, self._names[-1])

    def read_layers(self, policy: Policy, context: StageContext) -> tuple[TowerReading, list[tuple[Tensor, Tile, int]]]:
        """Return what ``read`` does, and ``tiles_of`` it."""
        reading = self.read(policy, context)
        keys, extra = reading.keys[..., : -self._number], reading.keys[..., -self._number :]
        reading = replace(reading, keys=keys)
        return reading, tiles_of(reading, context, extra, self._grids)

    def _of_tokens(self, seen: dict[str, Any]) -> tuple[Tensor, list[int]]:
        values, sizes = super()._of_tokens(seen)
        layout = self._layout
        grids = layout.grids(seen["sizes"])
        self._grids = [(height // layout.merge, width // layout.merge) for height, width in grids]
        read = [self._read(seen[name], layout.has_class_token) for name in self._names]
        places = torch.cat([torch.cartesian_prod(*map(torch.arange, grid)).view(-1, 2) for grid in self._grids])
        extra = [layout.merged(torch.cat(read, 1).float(), grids), places.to(values)]
        self._number = sum(part.shape[1] for part in extra)
        return torch.cat([values, *extra], 1), sizes


def scores_of(
    policy: TilePolicy | LayersPolicy, reading: TowerReading, tiles: list[tuple[Tensor, Tile, int]]
) -> Tensor:
    """Let ``policy`` choose tile by tile; the scores ``[B, V]`` of ``TilePolicy.score``."""
    scores = reading.scores.clone()
    for slots, tile, share in tiles:
        chosen = slots if share == len(slots) else slots[policy.choose(tile, share)]
        scores.view(-1)[chosen] += KEPT
    return scores.repeat_interleave(reading.repeats, 0)


def tiles_of(
    reading: TowerReading, context: StageContext, extra: Tensor | None = None, grids: Sequence[tuple[int, int]] = ()
) -> list[tuple[Tensor, Tile, int]]:
    """List the tiles of a batch that keep any tokens: their slots (``row * V + slot``), contents and shares."""
    projected = context.hidden_states[:: reading.repeats].flatten(0, 1)
    states = projected if reading.states is None else reading.states.flatten(0, 1)
    found = []
    shares = reading.shares(context.num_keep)
    for number, (slots, share) in enumerate(zip(reading.slots_of_tiles(), shares, strict=True)):
        if not share:
            continue
        grid, places = (1, len(slots)), torch.arange(len(slots), device=slots.device)
        values = scores = reading.scores.flatten()[slots]
        if extra is not None:
            values, grid = extra.flatten(0, 1)[slots], grids[number]
            places = (values[:, -2].round() * grid[1] + values[:, -1].round()).long()
            values = values[:, :-2]
        found.append((slots, Tile(scores, states[slots], projected[slots], values, places, grid), share))
    return found


def kept_with(scores: Tensor, states: Tensor, reading: TowerReading) -> Decision:
    """Make the decision of a batch of ``scores`` [B', V] and ``states`` [B', V, d] that count repeated rows once."""
    return Decision(scores.repeat_interleave(reading.repeats, 0), states=states.repeat_interleave(reading.repeats, 0))


def layer_at(model: PreTrainedModel, share: float) -> nn.Module:
    """Find the tower's layer at ``share`` of its depth: 0.375 is the 9th of 24.

    Of a tower with windows the nearest layer that attends to all.
    """
    tower = image_tower(model)
    layers = layers_of(tower)
    index = min(max(round(share * len(layers)), 1), len(layers)) - 1
    candidates = getattr(tower.config, "fullatt_block_indexes", None) or range(len(layers))
    return layers[min(candidates, key=lambda candidate: abs(candidate - index))]
