"""Attention pieces of the pruner: gathers, masks for shortened layers, scores from one query row."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from toprl_models.runtime.cache import check_rows


def gather_slots(tensor: Tensor, indices: Tensor) -> Tensor:
    """Rows of ``tensor`` [B or 1, N, d] at ``indices`` [B, m]: [B, m, d]."""
    tensor = tensor.expand(len(indices), -1, -1)
    return tensor.gather(1, indices[..., None].expand(-1, -1, tensor.shape[-1]))


def gather_tables(position_embeddings: Any, indices: Tensor | None) -> Any:
    """Rotary tables (cos, sin) at ``indices`` [B, m]; the tables themselves for None."""
    if indices is None:
        return position_embeddings
    return tuple(gather_slots(table, indices) for table in position_embeddings)


class LayerView:
    """A cache as seen by one layer: mask makers ask for the lengths of layer 0, but pruned layers are shorter."""

    def __init__(self, cache: Any, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._cache.get_seq_length(self._layer)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return type(self._cache).get_query_offset(self._cache, self._layer)

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return type(self._cache).get_mask_sizes(self._cache, query_length, self._layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def prefill_mask(mask: Tensor, indices: Tensor, valid: Tensor | None) -> Tensor:
    """The model's own 4-D mask [B, 1, N, L], rows and columns at ``indices`` [B, m], padding keys closed.

    Columns behind the N tokens, free slots of a static cache, stay as they are: closed.
    """
    mask = mask.expand(len(indices), -1, -1, -1)
    heads, length = mask.shape[1:3]
    mask = mask.gather(2, indices[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
    free = mask[..., length:]
    if free.shape[3]:
        dropped = free[..., :1].expand(-1, -1, -1, length - indices.shape[1])
        free = torch.cat([dropped, free], 3)
    mask = mask.gather(3, indices[:, None, None, :].expand(-1, heads, mask.shape[2], -1))
    if valid is not None:
        keys = valid[:, None, None, :]
        mask = mask & keys if mask.dtype == torch.bool else mask.masked_fill(~keys, torch.finfo(mask.dtype).min)
    return torch.cat([mask, free], 3) if free.shape[3] else mask


def padding_of(mask: Any, length: int) -> Tensor | None:
    """bool [B, n], n <= ``length``: the real ones of the tokens seen so far; None when the mask does not tell.

    Args:
        mask: the attention mask a model was called with: 2-D, or what generate() prepares for a static cache: 4-D, or
            a dict of those by layer type.
        length: of the tokens in the cache and those of this pass.

    Raises:
        TypeError: a mask of another kind.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"attention_mask is a {type(mask).__name__}; pass the 2-D padding mask while a Pruner is attached"
        )
    if mask.ndim == 4:
        mask = mask[:, 0, -1]  # the last token sees all real ones
        if mask.is_floating_point():
            mask = mask > torch.finfo(mask.dtype).min / 2
    return mask[:, :length].bool()


def rebuild_mask(config: Any, hidden_states: Tensor, valid: Tensor | None, view: LayerView | None) -> Any:
    """The causal mask in the form of the model's attention backend, sized for one layer's cache."""
    from transformers.masking_utils import create_causal_mask

    # where ``valid`` is given some slot is padding: transformers need not wait for the device to find out
    return create_causal_mask(config, hidden_states, valid, view, allow_is_causal_skip=valid is None)


def is_static_step(config: Any, hidden_states: Tensor, cache: Any) -> bool:
    """One new token on a cache of fixed size: its length is on the device, and a compiled step cannot wait for it.

    Flash attention is left out: it wants a padding mask that ends with the last token, so that the length matters.
    """
    fixed = hidden_states.shape[1] == 1 and getattr(cache, "is_compileable", False)
    return fixed and "flash" not in config._attn_implementation


def static_step_mask(config: Any, hidden_states: Tensor, stored: Tensor | None, view: LayerView) -> Any:
    """The mask of such a step: slots behind the ``stored`` ones [B, n] are valid, and causality closes free ones."""
    check_rows(stored, len(hidden_states))
    if stored is not None:
        stored = pad(stored, (0, view.get_mask_sizes(1)[0] - stored.shape[1]), value=True)
    return rebuild_mask(config, hidden_states, stored, view)


def refuse_views_ahead(mask: Any, past: int, length: int) -> None:
    """Refuse to rebuild as causal what is not: in some models the tokens of an image see each other.

    Args:
        mask: the model's own.
        past: tokens in the cache.
        length: tokens of this pass.

    Raises:
        ValueError: under ``mask`` some token sees the one behind it.
    """
    if hasattr(mask, "mask_mod"):
        batch = torch.arange(mask.shape[0], device=mask.kv_indices.device)[:, None]
        queries = torch.arange(length - 1, device=batch.device)[None]
        ahead = mask.mask_mod(batch, torch.zeros_like(batch), queries, queries + past + 1)
    elif isinstance(mask, Tensor) and mask.ndim == 4:
        ahead = mask.diagonal(past + 1, -2, -1)
        if mask.is_floating_point():
            ahead = ahead > torch.finfo(mask.dtype).min / 2
    else:
        return
    if bool(ahead.any()):
        raise ValueError(
            "the model lets image tokens see those behind them, which compact mode keeps only with attn_implementation "
            '"sdpa" or "eager", and with all images in the first forward pass on an empty cache'
        )


def query_attention(
    layer: Any, hidden_states: Tensor, position_embeddings: Any, queries: Tensor, valid: Tensor | None
) -> Tensor:
    """Attention of a few tokens in ``layer``: from their query rows and the keys, no N x N matrix.

    Args:
        layer: a decoder layer with ``input_layernorm`` and ``self_attn.{q,k}_proj``.
        hidden_states: what goes into it, ``[B, N, d]``.
        position_embeddings: its (cos, sin), ``[B or 1, N, head_dim]``.
        queries: int64 ``[B, R]``, slots of the tokens.
        valid: bool ``[B, N]`` or None; other slots are no keys.

    Returns:
        float32 ``[B, R, N]``: softmax over the keys, mean over heads. Keys of earlier turns are not counted.
    """
    attention = layer.self_attn
    apply_rotary = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    with torch.no_grad():
        normed = layer.input_layernorm(hidden_states)
        key = attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim))
        query = attention.q_proj(gather_slots(normed, queries)).unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        # the two sides have different lengths here: rotate each on its own
        cos, sin = (gather_slots(table, queries) for table in position_embeddings)
        query = apply_rotary(query, query, cos, sin)[0]
        cos, sin = (table.expand(len(normed), -1, -1) for table in position_embeddings)
        key = apply_rotary(key, key, cos, sin)[0]
        groups = query.shape[1] // key.shape[1]
        query = query.unflatten(1, (key.shape[1], groups)).flatten(2, 3)  # [B, Hkv, groups * R, head_dim]
        scores = (query.float() @ key.float().transpose(-1, -2)) * attention.scaling
        scores = scores.unflatten(2, (groups, -1))
        seen = torch.arange(normed.shape[1], device=normed.device) <= queries[..., None]  # causal
        if valid is not None:
            seen = seen & valid[:, None]
        return scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).mean((1, 2))
