"""Attention pieces of the pruner: gathers, masks for shortened layers, scores from one query row."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def gather_slots(tensor: Tensor, indices: Tensor) -> Tensor:
    """Rows of ``tensor`` [B or 1, N, d] at ``indices`` [B, m]: [B, m, d]."""
    tensor = tensor.expand(len(indices), -1, -1)
    return tensor.gather(1, indices[..., None].expand(-1, -1, tensor.shape[-1]))


class LayerView:
    """A cache as seen by one layer: mask makers ask layer 0 for lengths, but pruned layers are shorter."""

    def __init__(self, cache: Any, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._cache.get_seq_length(self._layer)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._cache.get_query_offset(self._layer)

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query_length, self._layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def prefill_mask(mask: Tensor, indices: Tensor | None, valid: Tensor | None) -> Tensor:
    """The model's own 4-D mask [B, 1, N, N], its rows and columns at ``indices`` [B, m], padding keys closed."""
    if indices is not None:
        mask = mask.expand(len(indices), -1, -1, -1)
        heads, length = mask.shape[1], mask.shape[3]
        mask = mask.gather(2, indices[:, None, :, None].expand(-1, heads, -1, length))
        mask = mask.gather(3, indices[:, None, None, :].expand(-1, heads, mask.shape[2], -1))
    if valid is None:
        return mask
    keys = valid[:, None, None, :]
    return mask & keys if mask.dtype == torch.bool else mask.masked_fill(~keys, torch.finfo(mask.dtype).min)


def rebuild_mask(config: Any, hidden_states: Tensor, valid: Tensor | None, view: LayerView | None) -> Any:
    """The causal mask in the form of the model's attention backend, sized for one layer's cache."""
    from transformers.masking_utils import create_causal_mask

    return create_causal_mask(config, hidden_states, valid, view)


def last_query_attention(
    layer: Any, hidden_states: Tensor, position_embeddings: Any, last: Tensor, valid: Tensor | None
) -> Tensor:
    """Attention of each sample's last token in ``layer``: from one query row and the keys, no N x N matrix.

    Args:
        layer: a decoder layer with ``input_layernorm`` and ``self_attn.{q,k}_proj``.
        hidden_states: what goes into it, ``[B, N, d]``.
        position_embeddings: its (cos, sin), ``[B or 1, N, head_dim]``.
        last: int64 ``[B]``, slot of the last prompt token.
        valid: bool ``[B, N]`` or None; other slots are no keys.

    Returns:
        float32 ``[B, N]``: softmax over the keys, mean over heads. Keys of earlier turns are not counted.
    """
    attention = layer.self_attn
    apply_rotary = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    with torch.no_grad():
        normed = layer.input_layernorm(hidden_states)
        rows = torch.arange(len(normed), device=normed.device)
        shape = (*normed.shape[:2], -1, attention.head_dim)
        key = attention.k_proj(normed).view(shape)
        query = attention.q_proj(normed[rows, last]).view(len(normed), 1, -1, attention.head_dim)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        cos, sin = (table.expand(len(normed), -1, -1) for table in position_embeddings)
        # the two sides have different lengths here: rotate each on its own
        query = apply_rotary(query, query, cos[rows, last][:, None], sin[rows, last][:, None])[0]
        key = apply_rotary(key, key, cos, sin)[0]
        groups = query.shape[1] // key.shape[1]
        query = query.unflatten(1, (key.shape[1], groups)).squeeze(3)  # [B, Hkv, groups, head_dim]
        scores = (query.float() @ key.float().transpose(-1, -2)) * attention.scaling
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
        causal = torch.arange(normed.shape[1], device=normed.device) <= last[:, None]
        scores = scores.masked_fill(~causal[:, None, None], -torch.inf)
        return scores.softmax(-1).mean((1, 2))
