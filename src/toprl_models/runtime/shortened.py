"""Masks, positions and rotary tables of a shortened sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from toprl_models.runtime.cache import LayerKeys, LayerView
from toprl_models.runtime.state import AttentionMask, ForwardPass, Segment, gather_slots

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedConfig, PreTrainedModel

RotaryTables: TypeAlias = Tensor | tuple[Tensor, ...] | None  # (cos, sin), or one complex table


def shortened_arguments(
    decoder: PreTrainedModel,
    forward: ForwardPass,
    keys: LayerKeys,
    hidden_states: Tensor,
    kwargs: Mapping[str, Any],
    kind: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Make the arguments of a layer that differ from the model's, for the current segment of a forward pass.

    ``kind`` is that of the layer where rotary tables differ by it.
    """
    refuse_tables_of_cached(kwargs.get("position_embeddings"), forward, hidden_states)
    mask = _mask(decoder.config, forward, keys, hidden_states, kwargs.get("attention_mask"))
    return {"attention_mask": mask, **_positions(decoder, forward.segment, keys.earlier, hidden_states, kwargs, kind)}


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
    if original is None or (isinstance(original, Tensor) and original.ndim == 2):  # causal
        return rebuild_mask(config, hidden_states, keys.valid, keys.view)
    return picked_mask(original, segment.slots if forward.prunes else None, keys, hidden_states)


def _positions(
    decoder: PreTrainedModel,
    segment: Segment,
    earlier: Tensor | None,
    hidden_states: Tensor,
    kwargs: Mapping[str, Any],
    kind: tuple[str, ...],
) -> dict[str, Any]:
    """Make rotary tables and positions, and the bounds of packed prompts for flash attention."""
    if segment.slots is None and earlier is None:
        return {}
    arguments: dict[str, Any] = {}
    positions, tables = kwargs.get("position_ids"), kwargs.get("position_embeddings")
    if positions is not None and segment.slots is not None:
        positions = _carried(segment, "position_ids", positions, gather_positions)
    if segment.moved is not None or earlier is not None:
        assert positions is not None
        if segment.moved is not None:
            positions = positions - segment.moved.to(positions.device)
        if earlier is not None:
            positions = positions - earlier[:, None].to(positions.device)
        if tables is not None:  # None: a layer without rotary positions
            like = hidden_states if isinstance(tables, Tensor) else hidden_states.to(tables[0].dtype)
            arguments["position_embeddings"] = decoder.rotary_emb(like, positions, *kind)
    elif tables is not None:
        arguments["position_embeddings"] = _carried(segment, "position_embeddings", tables, gather_tables)
    if "position_ids" in kwargs:
        arguments["position_ids"] = positions
    if "flash" in decoder.config._attn_implementation and segment.slots is not None:
        arguments |= flash_bounds(segment, kwargs)
    return arguments


# Arguments that the functions above make, and those that hold no token of the sequence
_KNOWN = frozenset({"hidden_states", "attention_mask", "position_embeddings", "position_ids", "past_key_values"})


def other_arguments(forward: ForwardPass, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Gather the survivors in every other argument of a layer that has a row for each token."""
    segment = forward.segment
    if segment.slots is None:
        return {}
    found = {}
    for name, value in kwargs.items():
        parts = value if isinstance(value, tuple | list) else (value,)
        if name in _KNOWN or not any(isinstance(part, Tensor) for part in parts):
            continue
        gathered = [_rows_of(name, part, segment.slots, forward.length) for part in parts]
        if any(new is not old for new, old in zip(gathered, parts, strict=True)):
            found[name] = type(value)(gathered) if isinstance(value, tuple | list) else gathered[0]
    return found


def _rows_of(name: str, value: Any, slots: Tensor, length: int) -> Any:
    """Gather ``value`` [B or 1, N, ...] at ``slots`` [B, m]; what has no N stays."""
    if not isinstance(value, Tensor) or length not in value.shape:
        return value
    if value.ndim < 2 or value.shape[1] != length or value.shape[0] not in (1, len(slots)):
        raise ValueError(
            f"decoder layers get {name} of shape {tuple(value.shape)}, of which pruning does not know what belongs to "
            f"which of the {length} tokens: this decoder is not supported"
        )
    rows = value.expand(len(slots), *value.shape[1:])
    slots = slots.to(value.device)
    return rows.gather(1, slots.view(*slots.shape, *[1] * (value.ndim - 2)).expand(*slots.shape, *value.shape[2:]))


def _carried(segment: Segment, name: str, source: Any, gather: Callable[..., Any]) -> Any:
    """Return the rows of ``source`` that a stage gathered along with the states, or gather them."""
    known, rows = segment.carried.get(name, (None, None))
    return rows if known is source and source is not None else gather(source, segment.slots)


def refuse_tables_of_cached(tables: RotaryTables, forward: ForwardPass, hidden_states: Tensor) -> None:
    """Refuse rotary tables that have rows for cached tokens, too: a pruned cache holds other tokens."""
    length = forward.length if forward.prunes else hidden_states.shape[1]
    for part in tables if isinstance(tables, tuple | list) else (tables,):
        if isinstance(part, Tensor) and part.ndim == 3 and part.shape[1] not in (1, length):
            raise ValueError(
                f"layers of this decoder get rotary tables for {part.shape[1]} tokens in a pass over {length}: those "
                "in the cache are included, which pruning does not support"
            )


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


def picked_mask(original: Tensor | BlockMask, slots: Tensor | None, keys: LayerKeys, hidden_states: Tensor) -> Any:
    """Pick the rows and columns of a layer's tokens from the model's own mask for the whole sequence.

    Args:
        original: 4-D (bool, or float to be added) or a BlockMask, [B or 1, 1, N, L]: its columns end with the N tokens
            of this pass, but for the free slots of a static cache.
        slots: int64 ``[B, m]``, the rows; None: all.
        keys: the keys that the layer sees; padding is closed, and so are keys older than the first column.
        hidden_states: ``[B, m, d]``, the tokens of this pass.
    """
    batch, num_queries = hidden_states.shape[:2]
    device = original.device if isinstance(original, Tensor) else original.kv_indices.device
    length, first = (num_queries, 0) if keys.view is None else keys.view.get_mask_sizes(num_queries)
    total = int(keys.past) + num_queries
    known = keys.origins()
    origins = torch.arange(total, device=device)[None] if known is None else known.to(device)
    columns = origins[:, first:].expand(batch, -1) - max(keys.whole - original.shape[-1], 0)
    closed = columns < 0 if keys.valid is None else (columns < 0) | ~keys.valid[:, first:].to(device)
    free = length - columns.shape[1]  # of a static cache
    columns, closed = pad(columns.clamp(min=0), (0, free)), pad(closed, (0, free), value=True)
    slots = torch.arange(num_queries, device=device).expand(batch, -1) if slots is None else slots.to(device)
    if isinstance(original, Tensor):
        mask = original.expand(batch, -1, -1, -1)
        mask = mask.gather(2, slots[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, columns[:, None, None].expand(-1, mask.shape[1], num_queries, -1))
        least = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return mask.masked_fill(closed[:, None, None], least)
    from torch.nn.attention.flex_attention import create_block_mask

    def survivors(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return original.mask_mod(row, head, slots[row, query], columns[row, key]) & ~closed[row, key]

    return create_block_mask(survivors, batch, None, num_queries, length, device=str(device))


def rebuild_mask(
    config: PreTrainedConfig, hidden_states: Tensor, valid: Tensor | None, view: LayerView | None
) -> AttentionMask:
    """Make the causal mask in the form of the model's attention backend, sized for one layer's cache."""
    from transformers.masking_utils import create_causal_mask

    # where ``valid`` is given some slot is padding: transformers need not wait for the device to find out
    return create_causal_mask(config, hidden_states, valid, view, allow_is_causal_skip=valid is None)
