"""Masks, positions and rotary tables of a shortened sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from toprl_models.runtime.cache import check_rows
from toprl_models.runtime.state import Packing, Segment, gather_slots


class LayerView:
    """A cache as seen by one layer: mask makers ask for the lengths of layer 0, but pruned layers are shorter."""

    def __init__(self, cache: Any, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self._cache.get_seq_length(self._layer)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return type(self._cache).get_query_offset(self._cache, self._layer)

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return type(self._cache).get_mask_sizes(self._cache, query_length, self._layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def gather_tables(tables: Any, slots: Tensor | None) -> Any:
    """Gather rotary tables at ``slots`` [B, m]: (cos, sin), or one complex table; None stays None.

    Raises:
        ValueError: tables of another shape than ``[B or 1, N, d]``.
    """
    if slots is None or tables is None:
        return tables
    parts = (tables,) if isinstance(tables, Tensor) else tuple(tables)
    if any(not isinstance(part, Tensor) or part.ndim != 3 for part in parts):
        raise ValueError(
            "position_embeddings of this decoder are no tables [batch, tokens, width]: compact mode cannot support it"
        )
    gathered = tuple(gather_slots(part, slots) for part in parts)
    return gathered[0] if isinstance(tables, Tensor) else gathered


def gather_positions(positions: Tensor, slots: Tensor) -> Tensor:
    """Gather positions ``[B or 1, N]``, or planes of them ``[K, B or 1, N]``, at ``slots`` [B, m]."""
    planes, slots = positions.shape[:-2], slots.to(positions.device)
    return positions.expand(*planes, len(slots), -1).gather(-1, slots.expand(*planes, -1, -1))


def flash_bounds(segment: Segment, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Tell flash attention the prompts of a row; positions with gaps would be read as bounds of packed prompts."""
    if segment.packing is None:
        return {"position_ids": None} if "position_ids" in kwargs else {}
    number = segment.packing.number[0]
    counts = torch.zeros(len(segment.packing.rows) + 1, dtype=torch.int32, device=number.device)
    counts = counts.scatter_add(0, number + 1, torch.ones_like(number, dtype=torch.int32))
    bounds, longest = counts.cumsum(0).to(torch.int32), int(counts.max())
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return {"position_ids": None, **lengths}


def prefill_mask(mask: Tensor, slots: Tensor, valid: Tensor | None) -> Tensor:
    """Gather rows and columns of the model's own 4-D mask [B, 1, N, L] at ``slots`` [B, m], padding keys closed.

    Columns after the N tokens, free slots of a static cache, stay as they are: closed.
    """
    slots = slots.to(mask.device)
    mask = mask.expand(len(slots), -1, -1, -1)
    heads, length = mask.shape[1:3]
    mask = mask.gather(2, slots[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
    free = mask[..., length:]
    if free.shape[3]:
        dropped = free[..., :1].expand(-1, -1, -1, length - slots.shape[1])
        free = torch.cat([dropped, free], 3)
    mask = mask.gather(3, slots[:, None, None, :].expand(-1, heads, mask.shape[2], -1))
    if valid is not None:
        keys = valid[:, None, None, :].to(mask.device)
        mask = mask & keys if mask.dtype == torch.bool else mask.masked_fill(~keys, torch.finfo(mask.dtype).min)
    return torch.cat([mask, free], 3) if free.shape[3] else mask


def packed_block_mask(packing: Packing, valid: Tensor | None) -> Any:
    """Make the BlockMask of survivors whose rows hold several prompts: causal within each prompt."""
    from torch.nn.attention.flex_attention import create_block_mask

    number = packing.number if valid is None else packing.number.masked_fill(~valid, -1)

    def survivors(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (number[batch, query] == number[batch, key])

    return create_block_mask(survivors, len(number), None, *[number.shape[1]] * 2, device=str(number.device))


def rebuild_mask(config: Any, hidden_states: Tensor, valid: Tensor | None, view: LayerView | None) -> Any:
    """Make the causal mask in the form of the model's attention backend, sized for one layer's cache."""
    from transformers.masking_utils import create_causal_mask

    # where ``valid`` is given some slot is padding: transformers need not wait for the device to find out
    return create_causal_mask(config, hidden_states, valid, view, allow_is_causal_skip=valid is None)


def is_static_step(config: Any, hidden_states: Tensor, cache: Any) -> bool:
    """Tell whether this is one new token on a cache of fixed size.

    Its length is on the device, and a compiled step cannot wait for it. Flash attention is left out: it wants a padding
    mask that ends with the last token, so that the length matters.
    """
    fixed = hidden_states.shape[1] == 1 and getattr(cache, "is_compileable", False)
    return fixed and "flash" not in config._attn_implementation


def static_step_mask(config: Any, hidden_states: Tensor, stored: Tensor | None, view: LayerView) -> Any:
    """Make the mask of such a step: slots after the ``stored`` ones [B, n] are valid; causality closes free ones."""
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
        ValueError: under ``mask`` some token sees the one after it.
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
            "the model lets image tokens see those after them, which compact mode keeps only with attn_implementation "
            '"sdpa" or "eager", and with all images in the first forward pass on an empty cache'
        )
