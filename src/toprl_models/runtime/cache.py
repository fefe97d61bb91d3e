"""State that the pruner keeps with a key/value cache, and how it follows the cache's rows and length."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from toprl_models.runtime.state import ForwardPass

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig


@dataclass
class CacheState:
    """State kept with a cache: by segment, validity (compact) or keep mask (mask) of the tokens so far, [B, n].

    A segment that is absent, and every token after the stored ones, counts as valid.

    Attributes:
        masks: by segment.
        shifts: by segment, int64 [B]: how far the positions of later tokens move down with renumbering.
        origins: by segment, int64 [B, n]: the slot in the sequence of each token that the segment's layers hold. Every
            token after these comes next in the sequence.
        lacks: by segment, tokens of the sequence that its layers do not hold, padding included.
        settled: length of the sequence up to the last visual token of a pruned prompt; later tokens are in all layers.
        removed: tokens of the sequence that were removed before layer 0, so that no layer holds them.
    """

    masks: dict[int, Tensor] = field(default_factory=dict)
    shifts: dict[int, Tensor] = field(default_factory=dict)
    origins: dict[int, Tensor] = field(default_factory=dict)
    lacks: dict[int, int] = field(default_factory=dict)
    settled: int = 0
    removed: int = 0

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every stored tensor, whose first dimension is the batch."""
        for stored in (self.masks, self.shifts, self.origins):
            stored.update({number: change(tensor) for number, tensor in stored.items()})

    def check_crop(self, tokens_to_remove: int, length: int) -> None:
        """Refuse to crop a sequence of ``length`` where its layers hold different tokens."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): the layers of a pruned cache have different lengths; pass the number of "
                "tokens to remove as a negative int"
            )
        if 0 < length + tokens_to_remove < self.settled:
            raise ValueError(
                f"crop({tokens_to_remove}) would cut into pruned visual tokens, where layers hold different tokens: "
                f"remove at most {length - self.settled} tokens or all {length}, or run the prompt again"
            )


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """Return the cache among a layer's arguments, whatever its name (GPT-NeoX: ``layer_past``); None without one."""
    if kwargs.get("past_key_values") is not None:
        return kwargs["past_key_values"]
    return next((value for value in kwargs.values() if hasattr(value, "get_seq_length")), None)


class _Follower:
    """Wrapper of one method of a cache object, which changes the pruner's state along with the cache.

    The cache is held weakly: caches are large and must go with their last user, not with the next garbage collection.
    """

    def __init__(self, cache: Cache, name: str) -> None:
        self._cache, self._name = weakref.ref(cache), name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache, args = self._cache(), (*args, *kwargs.values())
        assert cache is not None  # only the cache itself refers to its followers
        state: CacheState = cache._toprl_state
        if self._name == "crop":
            state.check_crop(args[0], cache.get_seq_length())
        result = getattr(type(cache), self._name)(cache, *args)
        if self._name == "batch_repeat_interleave":
            state.each(lambda tensor: tensor.repeat_interleave(args[0], 0))
        elif self._name not in ("crop", "reset"):
            state.each(lambda tensor: tensor.index_select(0, args[0].to(tensor.device)))
        elif not cache.get_seq_length(0):
            cache._toprl_state = CacheState()
        return result

    # deepcopy and pickle of a cache must bind the copy's followers to the copy
    def __getstate__(self) -> dict[str, Any]:
        return {"cache": self._cache(), "name": self._name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._cache, self._name = weakref.ref(state["cache"]), state["name"]


class _WholeSequence(_Follower):
    """Replaces a cache's length method after pruning before a layer that masks are sized by: reports the sequence's.

    Models and generate() read from layer 0 which positions and inputs come next, and make their masks for the first
    layer of a kind. Only ``get_seq_length(layer)`` tells how many tokens the layer holds.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self._cache()
        assert cache is not None  # only the cache itself refers to its followers
        own, whole = type(cache), type(cache).get_seq_length(cache) + cache._toprl_state.removed
        if self._name == "get_query_offset":
            return whole
        if self._name == "get_seq_length":
            return own.get_seq_length(cache, *args, **kwargs) if args or kwargs else whole
        sizes = own.get_mask_sizes(cache, *args, **kwargs)
        if getattr(cache, "is_compileable", False):
            return sizes
        query_length, layer = (*args, *kwargs.values())
        window = getattr(cache.layers[layer], "sliding_window", None) if layer < len(cache.layers) else None
        offset = 0 if window is None else max(whole - window + 1, 0)
        return whole + query_length - offset, offset


def cache_state(cache: Cache) -> CacheState:
    """Return the state kept with ``cache``; make it when there is none."""
    if not hasattr(cache, "_toprl_state"):
        cache._toprl_state = CacheState()
        for name in ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset"):
            if hasattr(cache, name):
                setattr(cache, name, _Follower(cache, name))
    return cache._toprl_state


def report_whole_sequence(cache: Cache, layer: int, count: int, first_attention: int) -> None:
    """Let ``cache`` report the length of the sequence where it is read from layers that hold ``count`` tokens less.

    Args:
        cache: of this pass.
        layer: the first that lacks the tokens.
        count: of tokens.
        first_attention: the layer by which ``get_seq_length()`` reports.
    """
    first = {type(cache.layers[i]): i for i in reversed(range(len(cache.layers)))}  # masks are sized by one of these
    if layer <= first_attention:
        cache_state(cache).removed += count
    if layer <= max(first_attention, *first.values()):
        for name in ("get_seq_length", "get_query_offset", "get_mask_sizes"):
            setattr(cache, name, _WholeSequence(cache, name))


def check_rows(stored: Tensor | None, batch: int) -> None:
    """Refuse a batch of another size than the prompt's that filled the cache."""
    if stored is not None and len(stored) != batch:
        raise RuntimeError(
            f"past_key_values was filled by a pruned prompt of {len(stored)} rows, but input_ids has {batch}: change "
            "the rows of a cache with its methods (batch_select_indices, batch_repeat_interleave, reorder_cache)"
        )


def cache_bytes(cache: Cache) -> int:
    """Count the bytes of all keys and values in a cache of transformers."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def extend_mask(stored: Tensor | None, new: Tensor | None, past: int, hidden_states: Tensor) -> Tensor | None:
    """Join the masks of ``past`` cached tokens and of this pass; tokens that neither mask covers count as 1."""
    if not past:
        return new
    like = stored if new is None else new
    if like is None:
        return None
    batch, length = hidden_states.shape[:2]
    check_rows(stored, batch)
    known = 0 if stored is None else min(past, stored.shape[1])  # decoding may have been rolled back
    ones = torch.ones(batch, past - known + length, dtype=like.dtype, device=like.device)
    parts = [] if stored is None else [stored[:, :known].to(like.dtype)]
    parts += [ones] if new is None else [ones[:, : past - known], new]
    return torch.cat(parts, 1)


class LayerView:
    """A cache as one layer has it: mask makers ask for the lengths of layer 0, but pruned layers are shorter."""

    def __init__(self, cache: Cache, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._cache.get_seq_length(self._layer)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return type(self._cache).get_query_offset(self._cache, self._layer)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return type(self._cache).get_mask_sizes(self._cache, query_length, self._layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


@dataclass
class LayerKeys:
    """The keys that a layer sees in a forward pass: those in its cache and those of the pass.

    Attributes:
        view: the cache as this layer has it; None without a cache.
        past: keys that were cached before.
        valid: bool ``[B, keys]``, False for padding; None where none is.
        origins: returns int64 ``[B or 1, keys]``, the slot of each in the sequence; None where it is their number.
        whole: tokens of the sequence, those of this pass included.
        earlier: int64 ``[B]``, by how much earlier passes moved later positions down; None: by nothing.
        is_static_step: whether one token enters a cache of fixed size. Its length is on the device, and a compiled step
            cannot wait for it, so ``past`` is 0. Slots after the known ones are valid: causality closes the free ones.
    """

    view: LayerView | None
    past: int
    valid: Tensor | None
    origins: Callable[[], Tensor | None] = lambda: None
    whole: int = 0
    earlier: Tensor | None = None
    is_static_step: bool = False


def layer_keys(
    forward: ForwardPass,
    number: int,
    index: int,
    cache: Cache | None,
    hidden_states: Tensor,
    num_stages: int,
    config: PreTrainedConfig,
) -> LayerKeys:
    """Find the keys that layer ``index`` sees in this pass of compact mode, and note the new ones with the cache.

    ``number`` is the segment whose tokens the layer has cached. Where it is not the current segment the layer is only
    asked for its scores, and nothing is noted.
    """
    segment, keeps = forward.segment, number == forward.current
    if cache is None:
        return LayerKeys(None, 0, segment.valid, lambda: segment.slots, forward.length)
    state: CacheState | None = getattr(cache, "_toprl_state", None)
    if forward.prunes and keeps:
        state = enter_cache(forward, cache, num_stages)
    view, earlier = LayerView(cache, index), None if state is None else state.shifts.get(number)
    if keeps:  # at later layers the state has this pass's shift in it
        if not segment.has_earlier:
            segment.has_earlier, segment.earlier = True, earlier
        earlier = segment.earlier
    # flash attention wants a padding mask that ends with the last token, so that the length matters
    fixed = getattr(cache, "is_compileable", False) and "flash" not in config._attn_implementation
    if state is not None and not forward.prunes and fixed and hidden_states.shape[1] == 1:
        stored = state.masks.get(number)
        check_rows(stored, len(hidden_states))
        if stored is not None:
            stored = pad(stored, (0, view.get_mask_sizes(1)[0] - stored.shape[1]), value=True)
        return LayerKeys(view, 0, stored, earlier=earlier, is_static_step=True)
    past = view.get_seq_length()
    stored = None
    if past:  # without a state earlier turns had no images, but may have had padding
        stored = state.masks.get(number) if state is not None else forward.past_valid
    valid = extend_mask(stored, segment.valid, past, hidden_states)
    # asked for now where it is noted, else when a mask needs it
    find: Callable[[], Tensor | None] = partial(key_origins, forward, number, state, int(past), hidden_states)
    lacks = state.lacks.get(number, 0) if state is not None and past else 0
    whole = forward.past + forward.length if forward.prunes else int(past) + hidden_states.shape[1] + lacks
    if state is not None and keeps:
        if forward.prunes or not past:
            origins = find()
            find = partial(_same, origins)
            state.origins.pop(number, None)
            state.lacks.pop(number, None)
            if origins is not None:
                state.origins[number], state.lacks[number] = origins, whole - origins.shape[1]
        if forward.prunes or segment.valid is not None or not past:
            state.masks.pop(number, None)  # not past: the cache was reset
            if valid is not None:
                state.masks[number] = valid
        if segment.shift is not None:
            state.shifts[number] = segment.shift if earlier is None else segment.shift + earlier
    return LayerKeys(view, past, valid, find, whole, earlier)


def _same(value: Tensor | None) -> Tensor | None:
    return value


def key_origins(
    forward: ForwardPass, number: int, state: CacheState | None, past: int, hidden_states: Tensor
) -> Tensor | None:
    """Find the slot in the sequence of ``past`` cached keys and of this pass: int64 [B or 1, n]; None: its own."""
    slots = forward.segment.slots if forward.prunes else None
    stored = state.origins.get(number) if state is not None and past else None
    if stored is None and (slots is None or not (past or forward.past)):
        return slots
    known = 0 if stored is None else min(past, stored.shape[1])  # decoding may have been rolled back
    later = torch.arange(known, past + (hidden_states.shape[1] if slots is None else 0), device=hidden_states.device)
    if stored is not None:
        later = later + state.lacks[number]  # type: ignore[union-attr]
    batch = len(stored if slots is None else slots)  # type: ignore[arg-type]
    parts = [] if stored is None else [stored[:, :known].to(later.device)]
    parts += [later.expand(batch, -1)] + ([] if slots is None else [slots.to(later.device) + forward.past])
    return torch.cat(parts, 1)


def refuse_unknown_layers(cache: Cache) -> None:
    """Refuse a cache that a model brings: it may count tokens in its own way."""
    for index, layer in enumerate(cache.layers):
        if type(layer).__module__.startswith("transformers.models."):
            raise ValueError(
                f"layer {index} keeps its keys in a {type(layer).__name__}, of which pruning does not know how it "
                "counts tokens: this decoder is not supported with a cache"
            )


def enter_cache(forward: ForwardPass, cache: Cache, num_stages: int) -> CacheState:
    """Return the state kept with a cache that a pruned prompt enters."""
    is_new = not hasattr(cache, "_toprl_state")
    state = cache_state(cache)
    if is_new:
        refuse_unknown_layers(cache)
        if forward.past_valid is not None:  # earlier turns had no images, but padding
            state.masks.update(dict.fromkeys(range(1, num_stages + 1), forward.past_valid))
        if getattr(cache, "is_compileable", False):
            warnings.warn(
                "a StaticCache allocates every layer for the unpruned prompt: pruning saves computation there, but no "
                "memory of the cache (docs/models.md); a DynamicCache is as short as what is kept",
                stacklevel=2,
            )
    if forward.segment.slots is not None:
        state.settled = forward.settled
    return state
