"""Which layers prune and how many visual tokens each keeps: plain data, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from toprl_kernels import flops

Keep = int | float
PAPER_LAYERS, PAPER_STAGES = 32, (2, 8, 16)


def stage_layers_for(num_layers: int, first: int = 1, stages: Sequence[int] = PAPER_STAGES) -> tuple[int, ...]:
    """Scale stages of a decoder of 32 layers to another depth; ascending, none before ``first``.

    Raises:
        ValueError: the decoder is too shallow for so many stages.

    Example:
        >>> stage_layers_for(28)
        (2, 7, 14)
    """
    layers: list[int] = []
    for layer in stages:
        layers.append(max(layers[-1] + 1 if layers else first, round(layer * num_layers / PAPER_LAYERS)))
    if layers[-1] >= num_layers:
        raise ValueError(f"num_layers={num_layers} is too few for stages before layers {tuple(layers)}")
    return tuple(layers)


@dataclass(frozen=True)
class Schedule:
    """The stages of progressive pruning (Eqs. 9-10).

    Args:
        stages: ``((layer, keep), ...)`` in ascending order of layers. Pruning happens *before* decoder layer ``layer``
            (0-based), so ``layer`` layers have run on what was there before; layer 0 is before the language model.
            ``keep`` is a fraction of the *original* visual tokens when it is a float, and a number of tokens when it is
            an int; it never grows.
        share: "row" lets the visual tokens of a prompt compete; "image" gives each image (tile group, frame) of n
            tokens its proportional share of the prompt's tokens. Images that follow each other without a token between
            them count as one, but for frames of a video that ``video_grid_thw`` tells apart (Qwen).

    Raises:
        ValueError: unknown ``share``, no stage, layers not ascending or negative, a fraction outside [0, 1], a negative
            count, or a stage that would keep more than the one before it.
        TypeError: a layer that is not an int, or a keep that is neither int nor float.

    Example:
        >>> schedule = Schedule(stages=((2, 0.5), (8, 0.25), (16, 64)))
        >>> schedule.counts(576)
        (288, 144, 64)
    """

    stages: tuple[tuple[int, Keep], ...]
    share: str = "row"

    def __post_init__(self) -> None:
        if self.share not in ("row", "image"):
            raise ValueError(f'share={self.share!r} must be "row" or "image"')
        stages = tuple((layer, keep) for layer, keep in self.stages)
        object.__setattr__(self, "stages", stages)
        if not stages:
            raise ValueError("stages=() is empty; give at least one (layer, keep) pair")
        previous_layer, previous_keep = -1, None
        for layer, keep in stages:
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise TypeError(f"stages: layer {layer!r} must be an int")
            if isinstance(keep, bool) or not isinstance(keep, int | float):
                raise TypeError(f"stages: keep {keep!r} at layer {layer} must be an int (tokens) or a float (fraction)")
            if layer <= previous_layer:
                raise ValueError(
                    f"stages={stages}: layer {layer} must be greater than {previous_layer}; layers ascend from 0"
                )
            if isinstance(keep, float) and not 0.0 <= keep <= 1.0:
                raise ValueError(f"stages: keep={keep} at layer {layer} must be a fraction in [0, 1] or an int count")
            if keep < 0:
                raise ValueError(f"stages: keep={keep} at layer {layer} must not be negative")
            if previous_keep is not None and type(keep) is type(previous_keep) and keep > previous_keep:
                raise ValueError(f"stages={stages}: keep grows from {previous_keep} to {keep} at layer {layer}")
            previous_layer, previous_keep = layer, keep

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for layer, _ in self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    def counts(self, num_visual: int) -> tuple[int, ...]:
        """Count the visual tokens that each stage keeps out of ``num_visual``; no stage keeps more than is left.

        Raises:
            ValueError: ``num_visual`` is negative.
        """
        if num_visual < 0:
            raise ValueError(f"num_visual={num_visual} must not be negative")
        kept, left = [], num_visual
        for _, keep in self.stages:
            # half up, not Python's half-to-even, so that .5 of an odd count is the same on both sides of a comparison
            wanted = keep if isinstance(keep, int) else math.floor(keep * num_visual + 0.5)
            left = min(left, wanted)
            kept.append(left)
        return tuple(kept)

    def segments(self, num_visual: int, num_layers: int) -> tuple[tuple[int, int], ...]:
        """Count the visual tokens that run through groups of layers: T + 1 segments ``((tokens, layers), ...)``.

        Raises:
            ValueError: a stage lies at or beyond ``num_layers``.
        """
        self.check_layers(num_layers)
        parts = flops.segments(num_visual, self._counted(num_visual), num_layers)
        return tuple((int(part.num_tokens), part.num_layers) for part in parts)

    def _counted(self, num_visual: int) -> tuple[tuple[int, int], ...]:
        return tuple(zip(self.layers, self.counts(num_visual), strict=True))

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError when a stage's layer does not exist in a decoder of ``num_layers`` layers."""
        if self.layers[-1] >= num_layers:
            raise ValueError(
                f"schedule: stage at layer {self.layers[-1]}, but the decoder has layers 0..{num_layers - 1}"
            )

    def average_tokens(self, num_visual: int, num_layers: int) -> float:
        """Average the visual tokens over all layers, the figure that papers call "retain N tokens"."""
        self.check_layers(num_layers)
        return flops.average_tokens(num_visual, self._counted(num_visual), num_layers)

    def macs(self, num_visual: int, config: flops.ModelLike) -> float:
        """Count the decoder's multiply-adds of visual tokens (Eqs. 8-9) for a text config of transformers."""
        return flops.schedule_macs(num_visual, self._counted(num_visual), config)

    @classmethod
    def for_budget(cls, average_tokens: float, layers: Sequence[int], *, num_visual: int, num_layers: int) -> Schedule:
        """Find the schedule with keeps r, r^2, ..., r^T (as PyramidDrop) whose average over all layers is the budget.

        Args:
            average_tokens: wanted average of visual tokens over all layers.
            layers: the stage layers, ascending.
            num_visual: visual tokens of one image.
            num_layers: decoder layers.

        Raises:
            ValueError: the budget cannot be met with these layers; the message states the floor.

        Example:
            >>> Schedule.for_budget(192, (2, 8, 16), num_visual=576, num_layers=32).counts(576)
            (322, 180, 101)
        """
        probe = cls(tuple((layer, 0.0) for layer in layers))
        floor = probe.average_tokens(num_visual, num_layers)
        if not floor <= average_tokens <= num_visual:
            raise ValueError(
                f"average_tokens={average_tokens} is impossible with stages at {tuple(layers)}: the first {layers[0]} "
                f"of {num_layers} layers see all {num_visual} tokens, so it lies between {floor:g} and {num_visual}"
            )
        low, high = 0.0, 1.0
        for _ in range(60):  # the average grows with r, so bisection reaches float precision
            ratio = (low + high) / 2
            stages = flops.keep_ratio_stages(num_visual, layers, ratio)
            average = flops.average_tokens(num_visual, stages, num_layers)
            low, high = (ratio, high) if average < average_tokens else (low, ratio)
        return cls(tuple((layer, ratio ** (i + 1)) for i, layer in enumerate(layers)))
