"""Pruning written down a second time, for decoders without a mask mode: tokens are cut out row by row, by hand.

Nothing is shared with the pruner: each row's survivors go through the unattached decoder alone, without padding and
without a cache, once for every stage, and the states that enter a stage's layer are those that left the run before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.models.conftest import HashPolicy
from tests.models.tiny_families import visual_mask
from toprl_models import Schedule
from toprl_models.probe import decoder_of

TOKENS = ("inputs_embeds", "attention_mask", "position_ids")


def kept_of(real_visual: Tensor, schedule: Schedule) -> list[tuple[int, Tensor]]:
    """Return each stage's layer and the visual tokens of one row, bool [V], that ``HashPolicy`` leaves."""
    alive, stages = real_visual.clone(), []
    counts = schedule.counts(int(real_visual.sum()))
    for stage, (layer, count) in enumerate(zip(schedule.layers, counts, strict=True)):
        scores = HashPolicy.scores_of(torch.arange(len(alive)), stage).masked_fill(~alive, -1)
        alive = torch.zeros_like(alive)
        alive[scores.argsort(descending=True, stable=True)[:count]] = True
        stages.append((layer, alive))
    return stages


def _row(value: Any, row: int, kept: Tensor, length: int) -> Any:
    """Cut the tokens ``kept`` of one row out of an argument with the tokens in its last, or last but one, axis."""
    axis = -2 if value.is_floating_point() else -1
    assert value.shape[axis] == length, value.shape
    value = value.index_select(axis, kept)
    batch = value.ndim + axis - 1
    return value if value.shape[batch] == 1 else value.narrow(batch, row, 1)


@contextlib.contextmanager
def by_hand(model: Any, schedule: Schedule) -> Iterator[None]:
    """Prune ``model`` as ``HashPolicy`` decides; every step is a pass over the whole sequence, without a cache."""
    decoder, seen = decoder_of(model), {}
    plain = decoder.forward

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen["ids"] = args[0] if args else kwargs["input_ids"]
        # placeholders that an answer holds are no visual tokens
        seen.setdefault("prompt", seen["ids"].shape[1])

    def forward(**kwargs: Any) -> Any:
        cache = kwargs.pop("past_key_values", None)
        assert cache is None or not cache.get_seq_length()
        kwargs["use_cache"] = False
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        batch, length = embeds.shape[:2]
        real = torch.ones(batch, length).bool() if mask is None else mask.bool()
        visual = visual_mask({"input_ids": seen["ids"]}) & real
        visual[:, seen["prompt"] :] = False
        others = {name: value for name, value in kwargs.items() if name not in TOKENS}
        given = {name: kwargs[name] for name in TOKENS if kwargs.get(name) is not None}
        given.setdefault("position_ids", torch.arange(length)[None])
        output = None
        states = torch.zeros_like(embeds)
        for row in range(batch):
            slots = real[row].nonzero()[:, 0]
            places = visual[row, slots].nonzero()[:, 0]
            stages = kept_of(torch.ones(len(places)).bool(), schedule)
            alive = torch.ones(len(slots)).bool()
            entering: Tensor | None = None
            for number in range(len(stages) + 1):
                last = number == len(stages)
                if number:
                    now = torch.ones(len(slots)).bool()
                    now[places] = stages[number - 1][1]
                    entering = entered["states"][:, now[alive]]  # noqa: F821
                    alive = now
                arguments = {name: _row(value, row, slots[alive], length) for name, value in given.items()}
                arguments["attention_mask"] = torch.ones(1, int(alive.sum()), dtype=torch.long)
                entered: dict[str, Tensor] = {}
                handles = []
                if entering is not None:
                    handles.append(_give(decoder.layers[stages[number - 1][0]], entering))
                if not last:
                    handles.append(_take(decoder.layers[stages[number][0]], entered))
                try:
                    output = plain(**arguments, **others)
                finally:
                    for handle in handles:
                        handle.remove()
            states[row, slots[alive]] = output.last_hidden_state[0]
        output.last_hidden_state = states
        return output

    handle = model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    decoder.forward, cached = forward, model.generation_config.use_cache
    model.generation_config.use_cache = False
    try:
        yield
    finally:
        model.generation_config.use_cache = cached
        del decoder.forward
        handle.remove()


def _give(layer: Any, states: Tensor) -> Any:
    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def _take(layer: Any, entered: dict[str, Tensor]) -> Any:
    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        entered["states"] = args[0] if args else kwargs["hidden_states"]

    return layer.register_forward_pre_hook(hook, with_kwargs=True)
