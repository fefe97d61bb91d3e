"""The layers before the first stage, run once per sample: the model is frozen and nothing is pruned before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from toprl_models.probe import decoder_of


@dataclass(frozen=True)
class Prefix:
    """One sample on the host, N tokens without padding.

    Attributes:
        states: ``[1, N, d]``, what the last of the layers gives.
        keys, values: ``[1, h, N, d_h]`` of each layer.
    """

    states: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.states, *self.keys, *self.values))


@torch.no_grad()
def prefix_of(model: Any, inputs: dict[str, Any], depth: int) -> Prefix:
    """Run the first ``depth`` decoder layers on the ``inputs`` of one sample."""
    decoder, states = decoder_of(model), []
    layers: nn.ModuleList = decoder.layers
    handle = layers[depth - 1].register_forward_hook(lambda module, args, output: states.append(output))
    cache = DynamicCache(config=model.config.get_text_config())
    decoder.layers = layers[:depth]
    try:
        model.base_model(**inputs, past_key_values=cache, use_cache=True)
    finally:
        decoder.layers = layers
        handle.remove()
    mine = cache.layers[:depth]
    return Prefix(
        states[0].cpu(), tuple(layer.keys.cpu() for layer in mine), tuple(layer.values.cpu() for layer in mine)
    )


@contextmanager
def skipping(model: Any, prefixes: Sequence[Prefix]) -> Iterator[None]:
    """Within, the prefill of the left-padded batch of these samples takes the first layers' results from them.

    Keys, values and states before a sample's first token are zero: the attention mask hides them.
    """
    layers: nn.ModuleList = decoder_of(model).layers
    depth = len(prefixes[0].keys)
    try:
        for index in range(depth):
            layers[index].forward = _remembering(layers[index].forward, prefixes, index, index == depth - 1)
        yield
    finally:
        for index in range(depth):
            vars(layers[index]).pop("forward", None)


def _remembering(forward: Callable[..., Tensor], prefixes: Sequence[Prefix], index: int, last: bool) -> Any:
    """A layer's ``forward`` that looks up the prompt's keys, values and, of the last layer, states."""

    def remembered(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length(index):  # a decoding step
            return forward(hidden_states, *args, **kwargs)
        length = hidden_states.shape[1]
        keys, values = (
            torch.cat([pad(one, (0, 0, length - one.shape[2], 0)) for one in column]).to(hidden_states.device)
            for column in ([p.keys[index] for p in prefixes], [p.values[index] for p in prefixes])
        )
        cache.update(keys, values, index)
        if not last:
            return hidden_states
        rows = [pad(p.states, (0, 0, length - p.states.shape[1], 0)) for p in prefixes]
        return torch.cat(rows).to(hidden_states.device)

    return remembered
