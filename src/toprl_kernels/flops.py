"""Cost of a pruning schedule, Eqs. 8-12, in units that are always named.

* ``macs``: multiply-adds. Eq. 8 counts these.
* ``flops``: floating-point operations, 2 per multiply-add. Eq. 11 counts these.
* ``paper_units``: Eq. 12 as printed, which adds Eq. 8 (macs) and Eq. 11 (flops). Use it only to compare with the
  paper's Table 3.

All counts cover the visual tokens alone. A schedule is a sequence of ``(layer, count)`` pairs: before decoder layer
``layer`` (0-based) the visual tokens are cut to ``count``. T stages make T + 1 segments of constant length; Eq. 9 is
their sum. Its r_i are keep ratios (n_i = r_i n), although the text calls them pruning ratios.

A model is anything with ``hidden_size``, ``intermediate_size`` and ``num_hidden_layers``: a transformers config, or
:class:`ModelDims`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

FLOPS_PER_MAC = 2

Stages = Sequence[tuple[int, float]]


class ModelLike(Protocol):
    """The three sizes Eq. 8 needs."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...


@dataclass(frozen=True)
class ModelDims:
    """Sizes of a decoder: d, m and the number of layers L of Eqs. 8-10."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int


MISTRAL_7B = ModelDims(4096, 14336, 32)  # the language model of LLaVA-NeXT-7B in Table 3
VICUNA_7B = ModelDims(4096, 11008, 32)  # of LLaVA-1.5-7B


@dataclass(frozen=True)
class Segment:
    """Consecutive layers that process the same number of visual tokens."""

    num_layers: int
    num_tokens: float


@dataclass(frozen=True)
class ScheduleCost:
    """Cost of one prefill, from :func:`schedule_cost`."""

    decoder_macs: float  # Eq. 9
    actor_macs: float  # Eq. 11 / 2
    average_tokens: float  # visual tokens per layer, mean over all layers

    @property
    def total_macs(self) -> float:
        return self.decoder_macs + self.actor_macs

    @property
    def total_flops(self) -> float:
        return FLOPS_PER_MAC * self.total_macs

    @property
    def paper_units(self) -> float:
        """Eq. 12 as printed: decoder in macs plus actor in flops."""
        return self.decoder_macs + FLOPS_PER_MAC * self.actor_macs


def segments(n_visual: float, stages: Stages, num_layers: int) -> list[Segment]:
    """Split the layers at the pruning stages: (n, k_1), (n_1, k_2 - k_1), ..., (n_T, L - k_T).

    Raises:
        ValueError: layers not strictly increasing within 0..L-1, or counts that grow or are negative.
    """
    result = []
    previous_layer, tokens = 0, n_visual
    for position, (layer, count) in enumerate(stages):
        if not 0 <= layer < num_layers or (position > 0 and layer <= previous_layer):
            raise ValueError(
                f"stages[{position}] has layer={layer}; layers must strictly increase within 0..{num_layers - 1}"
            )
        if not 0 <= count <= tokens:
            raise ValueError(f"stages[{position}] has count={count}; it must be within 0..{tokens}, the tokens left")
        result.append(Segment(layer - previous_layer, tokens))
        previous_layer, tokens = layer, count
    result.append(Segment(num_layers - previous_layer, tokens))
    return result


def keep_ratio_stages(n_visual: float, layers: Sequence[int], ratio: float) -> list[tuple[int, float]]:
    """Geometric schedule of PyramidDrop and TOP-RL: ratio, ratio^2, ... of the original tokens (not rounded)."""
    return [(layer, n_visual * ratio ** (position + 1)) for position, layer in enumerate(layers)]


def layer_macs(n_tokens: float, hidden_size: int, intermediate_size: int, kv_ratio: float = 1.0) -> float:
    """Multiply-adds of one decoder layer over n tokens: 4 n d^2 + 2 n^2 d + 3 n d m (Eq. 8).

    Args:
        kv_ratio: key/value heads over query heads. Eq. 8 ignores grouped queries, which is 1.0; a value below 1
            shrinks the two key and value projections.
    """
    projections = (2 + 2 * kv_ratio) * n_tokens * hidden_size**2
    attention = 2 * n_tokens**2 * hidden_size
    feed_forward = 3 * n_tokens * hidden_size * intermediate_size
    return projections + attention + feed_forward


def schedule_macs(n_visual: float, stages: Stages, model: ModelLike, kv_ratio: float = 1.0) -> float:
    """Multiply-adds of the whole decoder under a schedule (Eqs. 9-10)."""
    return sum(
        part.num_layers * layer_macs(part.num_tokens, model.hidden_size, model.intermediate_size, kv_ratio)
        for part in segments(n_visual, stages, model.num_hidden_layers)
    )


def actor_macs(n_tokens: float, d1: int, d2: int) -> float:
    """Multiply-adds of the actor over the tokens it reads: (d1 d2 + 2 d2^2) n (half of Eq. 11)."""
    return (d1 * d2 + 2 * d2**2) * n_tokens


def actor_flops(n_tokens: float, d1: int, d2: int) -> float:
    """Eq. 11: 2 (d1 d2 + 2 d2^2) n."""
    return FLOPS_PER_MAC * actor_macs(n_tokens, d1, d2)


def average_tokens(n_visual: float, stages: Stages, num_layers: int) -> float:
    """Visual tokens per layer, averaged over all layers: the honest common budget of pruning methods."""
    return sum(part.num_layers * part.num_tokens for part in segments(n_visual, stages, num_layers)) / num_layers


def schedule_cost(
    n_visual: float, stages: Stages, model: ModelLike, *, actor_width: int | None = None, kv_ratio: float = 1.0
) -> ScheduleCost:
    """Eq. 12 taken apart. The actor of stage t reads the tokens that are left before stage t.

    Args:
        actor_width: d2 of the actor, with d1 = hidden size; None for methods without an actor.
    """
    num_layers = model.num_hidden_layers
    parts = segments(n_visual, stages, num_layers)
    read_by_actor = sum(part.num_tokens for part in parts[:-1])
    return ScheduleCost(
        decoder_macs=schedule_macs(n_visual, stages, model, kv_ratio),
        actor_macs=0.0 if actor_width is None else actor_macs(read_by_actor, model.hidden_size, actor_width),
        average_tokens=average_tokens(n_visual, stages, num_layers),
    )


def kv_cache_bytes(
    n_visual: float,
    stages: Stages,
    *,
    num_layers: int,
    num_key_value_heads: int,
    head_dim: int,
    bytes_per_element: int = 2,
) -> float:
    """Bytes of keys and values the visual tokens hold when every layer stores only the tokens it processed."""
    per_token_and_layer = 2 * num_key_value_heads * head_dim * bytes_per_element
    return average_tokens(n_visual, stages, num_layers) * num_layers * per_token_and_layer
