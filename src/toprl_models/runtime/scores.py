"""Attention scores that are the model's own: queries, keys and mask as a layer hands them to its attention function.

All attention modules of transformers end in one call, ``ALL_ATTENTION_FUNCTIONS.get_interface(implementation,
eager_attention_forward)(module, query, key, value, attention_mask, scaling=..., ...)``, where norms, rotary positions,
scaling and the cache have been applied. ``Watched`` puts a function there, for one call of one module, that notes the
arguments; the weights of a few query rows are then the model's own ``eager_attention_forward`` of these rows.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from toprl_models.probe import blocked_stages, branches_on_backend, has_attention
from toprl_models.runtime.prompt import open_slots
from toprl_models.runtime.state import AttentionMask, Length, Packing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import Cache, PreTrainedConfig, PreTrainedModel


class _Stop(Exception):
    """End of a layer's forward pass at its attention function."""


def attention_of(layer: nn.Module) -> nn.Module:
    """Find the single module of a decoder layer that calls transformers' attention interface."""
    modules = [module for module in layer.modules() if "ALL_ATTENTION_FUNCTIONS" in _names(module)]
    if len(modules) != 1 or "config" not in vars(modules[0]):
        kinds = ", ".join(type(module).__name__ for module in modules) or "none"
        raise ValueError(
            f"{type(layer).__name__} has no single softmax attention of transformers' attention interface (modules "
            f"that use it: {kinds}), so attention scores of this layer cannot be supported: choose another stage, or "
            "a method that reads no attention"
        )
    if _eager_of(modules[0]) is None:
        raise ValueError(
            f"{type(modules[0]).__name__} has no eager_attention_forward, so its attention scores cannot be supported: "
            "choose a method that reads no attention"
        )
    if branches_on_backend(modules[0]):
        raise ValueError(
            f"{type(modules[0]).__name__} does something that depends on the name of the attention backend, which the "
            "pruner must replace to see attention scores: choose a method that reads no attention"
        )
    return modules[0]


def source_of(layers: nn.ModuleList, stage_layer: int) -> int:
    """Return the last layer with attention before a stage: recurrent layers may lie between."""
    return next((index for index in reversed(range(stage_layer)) if has_attention(layers[index])), stage_layer - 1)


def fitting_layers(decoder: PreTrainedModel, wanted: Sequence[int], reads: Sequence[str]) -> tuple[int, ...]:
    """Move stages on to the first layers that offer what their policies read; leave out those that find none.

    Args:
        decoder: the text decoder.
        wanted: the stages' layers, ascending.
        reads: the ``attention_from`` of each stage's policy.
    """
    layers: Any = decoder.layers
    blocked = blocked_stages(decoder)
    found: list[int] = []
    for layer, attention_from in zip(wanted, reads, strict=True):
        earlier = found[-1] if found else -1
        for candidate in range(max(layer, earlier + 1), len(layers)):
            source = candidate if attention_from == "current" else source_of(layers, candidate)
            offers = attention_from == "none" or (source >= max(earlier, 0) and has_attention(layers[source]))
            if offers and candidate not in blocked:
                found.append(candidate)
                break
    return tuple(found)


def _forward_of(module: nn.Module) -> FunctionType:
    return inspect.unwrap(type(module).forward)


def _names(module: nn.Module) -> tuple[str, ...]:
    code = getattr(_forward_of(module), "__code__", None)
    return () if code is None else code.co_names


def _eager_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    return _forward_of(module).__globals__.get("eager_attention_forward")


@dataclass
class Observation:
    """Arguments that an attention module handed to its attention function in a forward pass.

    Shapes: ``query`` ``[B, H, n, D]``, ``key`` ``[B, Hkv, L, D]`` with cached keys, ``value`` likewise; ``mask`` in the
    form of the model's backend.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: AttentionMask
    arguments: dict[str, Any]

    def weights(
        self,
        queries: Tensor,
        past: Length,
        packing: Packing | None = None,
        keep_mask: Tensor | None = None,
        heads: str = "mean",
    ) -> Tensor:
        """Compute the attention of a few tokens: float32 ``[P, R, L]``, softmax over the keys.

        Args:
            queries: int64 ``[P, R]``, slots of the tokens.
            past: keys that were cached before this pass.
            packing: prompts of the rows; None where a row is a prompt.
            keep_mask: ``[B, L]`` of mask mode, where 0 is a key that only its token sees.
            heads: the "mean" over heads, or the "max".
        """
        visible = visible_rows(self.mask, queries, self.key.shape[2], past, packing)
        if keep_mask is not None:
            kept = keep_mask[:, -self.key.shape[2] :] > 0
            kept = pad(kept, (0, self.key.shape[2] - kept.shape[1]))
            kept = kept if packing is None else kept[packing.row_index]
            itself = torch.arange(self.key.shape[2], device=kept.device) == queries[..., None] + past
            visible = visible & (kept[:, None] | itself)
        if packing is None:
            return over_heads(self._eager(self.query, self.key, self.value, queries, visible), heads)
        rows = [slice(row, row + 1) for row in packing.rows]
        parts = [
            self._eager(self.query[row], self.key[row], self.value[row], queries[i : i + 1], visible[i : i + 1])
            for i, row in enumerate(rows)
        ]
        return over_heads(torch.cat(parts), heads)

    def _eager(self, query: Tensor, key: Tensor, value: Tensor, queries: Tensor, visible: Tensor) -> Tensor:
        """Compute the weights of all heads, ``[P, H, R, L]``."""
        index = queries[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        closed = torch.zeros(visible.shape, device=query.device).masked_fill(~visible, torch.finfo(torch.float32).min)
        eager = _eager_of(self.module)
        assert eager is not None
        with torch.no_grad():
            _, weights = eager(
                self.module,
                query.gather(2, index).float(),
                key.float(),
                value[..., :1].float(),
                closed[:, None],
                **self.arguments | {"dropout": 0.0},
            )
        return weights.float()


def over_heads(weights: Tensor, heads: str) -> Tensor:
    """Reduce weights ``[P, H, R, L]`` to the "mean" or the "max" over heads."""
    return weights.amax(1) if heads == "max" else weights.mean(1)


def visible_rows(mask: AttentionMask, queries: Tensor, num_keys: int, past: Length, packing: Packing | None) -> Tensor:
    """Find the keys that some query rows see, from the mask of any attention backend: bool ``[P, R, num_keys]``.

    Args:
        mask: 4-D (bool, or float to be added), a BlockMask, a 2-D padding mask under causality, or None for causality.
        queries: int64 ``[P, R]``, slots among the queries of the pass; ``past`` keys come before the first.
    """
    row = torch.arange(len(queries), device=queries.device) if packing is None else packing.row_index
    keys = torch.arange(num_keys, device=queries.device)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        visible = open_slots(mask)
        visible = visible.expand(int(len(queries) if packing is None else max(packing.rows) + 1), -1, -1)
        return visible[row[:, None], queries][..., :num_keys]
    if mask is not None and hasattr(mask, "mask_mod"):
        batch = row[:, None, None].expand(*queries.shape, num_keys)
        return mask.mask_mod(batch, torch.zeros_like(batch), queries[..., None].expand_as(batch), keys.expand_as(batch))
    visible = keys <= queries[..., None] + past
    if mask is not None:
        visible = visible & pad(mask.bool(), (0, num_keys - mask.shape[1]))[row][:, None]
    if packing is not None:  # flash attention has the bounds of packed prompts in other arguments
        before = int(past)
        number = pad(packing.number, (before, num_keys - before - packing.number.shape[1]), value=-1)[row]
        visible = visible & (number == torch.arange(len(queries), device=keys.device)[:, None])[:, None]
    return visible


class Watched:
    """Stand-in for the config of one attention module until its attention function is called once.

    ``end()`` gives the config back where the call may not have come.
    """

    def __init__(self, module: nn.Module, stops: bool = False) -> None:
        from transformers import AttentionInterface

        self._module, self._stops = module, stops
        self._config: PreTrainedConfig = module.config
        self.seen: Observation | None = None
        # a name that still tells "flash" from the others
        self._attn_implementation = f"toprl_watch_{getattr(module.config, '_attn_implementation', None)}"
        AttentionInterface.register(self._attn_implementation, _attention)
        module.config = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def end(self) -> None:
        self._module.config = self._config

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, kwargs: dict[str, Any]) -> Any:
        self.end()
        self.seen = Observation(self._module, query.detach(), key.detach(), value.detach(), mask, kwargs)
        if self._stops:
            raise _Stop
        interface = _forward_of(self._module).__globals__["ALL_ATTENTION_FUNCTIONS"]
        name = self._config._attn_implementation
        return interface.get_interface(name, _eager_of(self._module))(self._module, query, key, value, mask, **kwargs)


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **kwargs: Any) -> Any:
    """Note the arguments of an attention call of transformers, then call the model's own attention function."""
    return module.config(query, key, value, mask, kwargs)


class _Peek:
    """A cache that gives a layer the keys it would see, without storing new ones."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self._cache.get_seq_length(layer_idx):
            return key, value
        return copy.deepcopy(self._cache.layers[layer_idx]).update(key, value, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def ask(layer: nn.Module, hidden_states: Tensor, kwargs: Mapping[str, Any]) -> Observation:
    """Ask a layer for its queries and keys: run it up to its attention function; no cache is written."""
    module = attention_of(layer)
    arguments = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    arguments |= {name: _Peek(value) for name, value in arguments.items() if hasattr(value, "get_seq_length")}
    watched = Watched(module, stops=True)
    try:
        with torch.no_grad():
            layer(hidden_states, **arguments)
    except _Stop:
        pass
    finally:
        watched.end()
    if watched.seen is None:
        raise RuntimeError(f"{type(layer).__name__} did not call the attention function of {type(module).__name__}")
    return watched.seen


class HeadGroup:
    """Ranks among which tensor parallelism divides a model's heads; all ranks take the same decision."""

    def __init__(self, model: PreTrainedModel) -> None:
        mesh = getattr(model, "_device_mesh", None) if (getattr(model, "tp_size", None) or 1) > 1 else None
        if mesh is not None and mesh.ndim > 1:
            mesh = mesh["tp"]
        self._group: ProcessGroup | None = None if mesh is None else mesh.get_group()

    def mean(self, weights: Tensor) -> Tensor:
        """Average over all heads of all ranks, where ``weights`` are the means of this rank's heads."""
        if self._group is not None:
            dist.all_reduce(weights, group=self._group)
            weights = weights / dist.get_world_size(self._group)
        return weights

    def largest(self, weights: Tensor) -> Tensor:
        """Take the largest over all heads of all ranks, where ``weights`` are the largest of this rank's heads."""
        if self._group is not None:
            dist.all_reduce(weights, op=dist.ReduceOp.MAX, group=self._group)
        return weights

    def agree(self, decision: Tensor) -> Tensor:
        """Take the first rank's decision."""
        if self._group is not None:
            decision = decision.contiguous()
            dist.broadcast(decision, dist.get_process_group_ranks(self._group)[0], group=self._group)
        return decision
