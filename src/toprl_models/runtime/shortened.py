"""Masks, positions and rotary tables of a shortened sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from toprl_models.runtime.cache import LayerKeys, LayerView
from toprl_models.runtime.state import AttentionMask, ForwardPass, Packing, Segment, gather_slots

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

RotaryTables: TypeAlias = Tensor | tuple[Tensor, ...] | None  # (cos, sin), or one complex table


def shortened_arguments(
    decoder: PreTrainedModel, forward: ForwardPass, keys: LayerKeys, hidden_states: Tensor, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Make the arguments of a layer that differ from the model's, for the current segment of a forward pass."""
    mask = _mask(decoder.config, forward, keys, hidden_states, kwargs.get("attention_mask"))
    return {"attention_mask": mask, **_positions(decoder, forward.segment, keys.earlier, hidden_states, kwargs)}


def _mask(
    config: PreTrainedConfig, forward: ForwardPass, keys: LayerKeys, hidden_states: Tensor, original: AttentionMask
) -> AttentionMask:
    segment = forward.segment
    if keys.is_static_step:
        return rebuild_mask(config, hidden_states, keys.valid, keys.view)
    if original is None and keys.valid is None:
        return None
    if forward.prunes and not keys.past and segment.slots is None:
        return original
    if segment.slots is not None and not keys.past and isinstance(original, Tensor) and original.ndim == 4:
        return prefill_mask(original, segment.slots, segment.valid)
    if forward.prunes and forward.rebuilt_from is not original:
        refuse_views_ahead(original, forward.past, forward.length)
        forward.rebuilt_from = original
    if segment.packing is not None and hasattr(original, "mask_mod"):
        return packed_block_mask(segment.packing, segment.valid)
    return rebuild_mask(config, hidden_states, keys.valid, keys.view)


def _positions(
    decoder: PreTrainedModel, segment: Segment, earlier: Tensor | None, hidden_states: Tensor, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Make rotary tables and positions, and the bounds of packed prompts for flash attention."""
    if segment.slots is None and earlier is None:
        return {}
    arguments: dict[str, Any] = {}
    positions = kwargs.get("position_ids")
    if positions is not None and segment.slots is not None:
        positions = _carried(segment, "position_ids", positions, gather_positions)
    if segment.moved is not None or earlier is not None:
        assert positions is not None
        if segment.moved is not None:
            positions = positions - segment.moved.to(positions.device)
        if earlier is not None:
            positions = positions - earlier[:, None].to(positions.device)
        arguments["position_embeddings"] = decoder.rotary_emb(hidden_states, positions)
    elif "position_embeddings" in kwargs:
        tables = kwargs["position_embeddings"]
        arguments["position_embeddings"] = _carried(segment, "position_embeddings", tables, gather_tables)
    if "position_ids" in kwargs:
        arguments["position_ids"] = positions
    if "flash" in decoder.config._attn_implementation and segment.slots is not None:
        arguments |= flash_bounds(segment, kwargs)
    return arguments


def _carried(segment: Segment, name: str, source: Any, gather: Callable[..., Any]) -> Any:
    """Return the rows of ``source`` that a stage gathered along with the states, or gather them."""
    known, rows = segment.carried.get(name, (None, None))
    return rows if known is source and source is not None else gather(source, segment.slots)


def gather_tables(tables: RotaryTables, slots: Tensor | None) -> RotaryTables:
    """Gather rotary tables ``[B or 1, N, d]`` at ``slots`` [B, m]."""
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


def flash_bounds(segment: Segment, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Tell flash attention the prompts of a row; it would take gaps between positions for their bounds."""
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


def packed_block_mask(packing: Packing, valid: Tensor | None) -> AttentionMask:
    """Make the BlockMask of survivors whose rows hold several prompts: causal within each prompt."""
    from torch.nn.attention.flex_attention import create_block_mask

    number = packing.number if valid is None else packing.number.masked_fill(~valid, -1)

    def survivors(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (number[batch, query] == number[batch, key])

    batch, length = number.shape
    return create_block_mask(survivors, batch, None, length, length, device=str(number.device))


def rebuild_mask(
    config: PreTrainedConfig, hidden_states: Tensor, valid: Tensor | None, view: LayerView | None
) -> AttentionMask:
    """Make the causal mask in the form of the model's attention backend, sized for one layer's cache."""
    from transformers.masking_utils import create_causal_mask

    # where ``valid`` is given some slot is padding: transformers need not wait for the device to find out
    return create_causal_mask(config, hidden_states, valid, view, allow_is_causal_skip=valid is None)


def refuse_views_ahead(mask: AttentionMask, past: int, length: int) -> None:
    """Refuse to rebuild a model's mask, under which tokens of an image see each other, as a causal mask.

    ``past`` tokens are in the cache, ``length`` in this pass.
    """
    if isinstance(mask, Tensor):
        if mask.ndim != 4:
            return
        ahead = mask.diagonal(past + 1, -2, -1)
        if mask.is_floating_point():
            ahead = ahead > torch.finfo(mask.dtype).min / 2
    elif mask is not None and hasattr(mask, "mask_mod"):
        batch = torch.arange(mask.shape[0], device=mask.kv_indices.device)[:, None]
        queries = torch.arange(length - 1, device=batch.device)[None]
        ahead = mask.mask_mod(batch, torch.zeros_like(batch), queries, queries + past + 1)
    else:
        return
    if bool(ahead.any()):
        raise ValueError(
            "the model lets image tokens see those after them, which compact mode keeps only with attn_implementation "
            '"sdpa" or "eager", and with all images in the first forward pass on an empty cache'
        )
