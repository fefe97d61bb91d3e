"""Compact mode: before a stage's layer the survivors are gathered; later layers run on the short sequence.

They write short key/value caches, and get the mask, positions and rotary tables of the survivors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toprl_kernels import prune_stage, topk_compact
from toprl_kernels.stage.reference import score_difference
from toprl_models.policy import Decision
from toprl_models.probe import first_attention, has_kinds_of_positions, keyless_layers
from toprl_models.runtime.cache import cache_of, enter_cache, layer_keys, report_whole_sequence
from toprl_models.runtime.guards import refuse_packing_with_state, refuse_padding_after_state
from toprl_models.runtime.outputs import Survivors, scatter_all, scatter_back, slots_of
from toprl_models.runtime.shortened import other_arguments, shortened_arguments
from toprl_models.runtime.stage import Stage, trace_of
from toprl_models.runtime.state import ForwardPass, Packing, Segment, Visual, on_device, put, visual_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPast


class Compact:
    """Mode that removes dropped tokens, and their keys and values.

    Args:
        decoder: the text decoder.
        stage_layers: the layers before which stages prune.
        renumbers: of each stage, whether survivors get consecutive positions.
    """

    name = "compact"

    def __init__(self, decoder: PreTrainedModel, stage_layers: tuple[int, ...], renumbers: tuple[bool, ...]) -> None:
        self._decoder, self._stage_layers, self._renumbers = decoder, stage_layers, renumbers
        self._config, self._first_attention = decoder.config, first_attention(decoder.layers)
        self._keyless = keyless_layers(decoder.layers)
        # of each layer, where rotary tables differ by it
        self._kinds = decoder.config.layer_types if has_kinds_of_positions(decoder) else None

    def install(self, model: PreTrainedModel) -> None:
        """Prepare ``model``: nothing to do."""

    def uninstall(self, model: PreTrainedModel) -> None:
        """Undo ``install``."""

    # -- a stage ---------------------------------------------------------------------------------------------------

    def at_stage(
        self,
        forward: ForwardPass,
        stage: Stage,
        hidden_states: Tensor,
        decision: Decision,
        counts: tuple[int, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Gather the survivors of ``hidden_states`` [B, n, d] and begin the next segment: [B, m, d]."""
        before_visual, before = forward.visual, forward.segment
        number, before_length = stage.number + 1, hidden_states.shape[1]
        if drops_nothing(before_visual, counts):  # no gather, so keep-all is bitwise the unattached model
            after = Segment(before.slots, before.valid, before.moved, before.shift, before.packing)
            indices = before_visual.index.masked_fill(~before_visual.valid, -1)
        else:
            hidden_states, after = self._gather(forward, stage, hidden_states, decision, counts, kwargs)
            indices = forward.visual.index
        forward.segments[number], forward.current = after, number
        removed = before_length - hidden_states.shape[1]
        cache = cache_of(kwargs)
        if removed and cache is not None:
            enter_cache(forward, cache, len(self._stage_layers))
            report_whole_sequence(cache, self._stage_layers[stage.number], removed, self._first_attention)
        forward.trace.append(trace_of(stage, forward, before_visual, decision, indices, counts))
        return hidden_states

    def _gather(
        self,
        forward: ForwardPass,
        stage: Stage,
        hidden_states: Tensor,
        decision: Decision,
        counts: tuple[int, ...],
        kwargs: Mapping[str, Any],
    ) -> tuple[Tensor, Segment]:
        visual, before, raster = forward.visual, forward.segment, forward.visual.index
        packing = before.packing
        if packing is not None:
            refuse_packing_with_state(self._decoder.layers)
        if decision.states is not None:
            hidden_states = put(hidden_states, visual.slots, visual.valid, decision.states, packing)
        scores, columns, kept = selection(forward, stage, decision, counts), forward.columns, counts
        if packing is not None:  # scores and raster numbers by token, as prompts share a row
            raster = torch.full(packing.number.shape, -1, device=raster.device)
            raster = put(raster, visual.slots, visual.valid, visual.index, packing)
            scores = put(scores.new_zeros(raster.shape), visual.slots, visual.valid, scores, packing)
            columns = torch.where(raster >= 0, torch.arange(raster.shape[1], device=raster.device), -1)
        assert columns is not None
        dropped = [present - left for present, left in zip(visual.counts, counts, strict=True)]
        totals = list(forward.row_tokens)
        for row, count in zip(range(len(counts)) if packing is None else packing.rows, dropped, strict=True):
            totals[row] -= count
        if packing is not None:
            kept = tuple(
                sum(count for count, of in zip(counts, packing.rows, strict=True) if of == row)
                for row in range(len(totals))
            )
        sources = carried_arguments(kwargs, hidden_states)
        tables = sources.get("position_embeddings", ())
        out = prune_stage(
            hidden_states,
            scores,
            columns,
            forward.numbers(kept, hidden_states.device),
            length=max(totals),
            width=max(kept),
            valid_mask=before.valid,
            origins=before.slots,
            raster=raster,
            position_ids=sources.get("position_ids"),
            tables=(tables,) if isinstance(tables, Tensor) else tables,
            padding_side="left",  # generation reads the last position
        )
        after = Segment(out.origins, out.valid_mask if len(set(totals)) > 1 else None)
        results = {"position_ids": out.position_ids, "position_embeddings": out.tables}
        if isinstance(tables, Tensor):
            results["position_embeddings"] = out.tables[0]
        after.carried = {name: (kwargs[name], results[name]) for name in sources}
        indices = out.indices if after.valid is None else out.indices.clamp(min=0)
        if packing is not None:
            after.packing = Packing(packing.number.gather(1, indices), packing.rows, packing.row_index)
        self._move(before, after, indices, columns, dropped, self._renumbers[stage.number])
        forward.row_tokens = tuple(totals)
        if packing is None:
            forward.columns = out.columns
            forward.visual = Visual(out.slots, out.listed, out.raster, counts)
        else:
            by_token = raster.gather(1, indices)
            by_token = by_token if after.valid is None else by_token.masked_fill(~after.valid, -1)
            forward.visual = visual_of(by_token, counts, after.packing)
        return out.hidden_states, after

    def _move(
        self, before: Segment, after: Segment, indices: Tensor, columns: Tensor, dropped: list[int], renumbers: bool
    ) -> None:
        """Note how far the survivors' positions move down."""
        after.shift = before.shift
        if before.moved is not None:
            after.moved = before.moved.gather(1, indices)
        if not renumbers:
            return
        real = torch.ones_like(indices) if after.valid is None else after.valid.long()
        kept = torch.zeros_like(columns).scatter_add(1, indices, real) > 0
        gone = ((columns >= 0) & ~kept).cumsum(1)
        total = gone[:, -1]
        if before.packing is not None:
            gone = gone - on_device(before.packing.before(dropped), gone.device)[before.packing.number]
        gone = gone.gather(1, indices)
        after.moved = gone if after.moved is None else after.moved + gone
        after.shift = total if after.shift is None else after.shift + total

    # -- a layer ---------------------------------------------------------------------------------------------------

    def before_layer(
        self, forward: ForwardPass, number: int, index: int, hidden_states: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Replace mask, rotary tables and positions by those of the current segment.

        ``number`` is the segment whose tokens layer ``index`` has cached; the next segment when asked for scores.
        """
        cache = cache_of(kwargs)
        segment, asked = forward.segment, number != forward.current
        if not forward.prunes:
            state = getattr(cache, "_toprl_state", None)
            if state is None:
                return kwargs  # this cache was filled without pruning: the model's own mask fits
            is_plain = kwargs.get("attention_mask") is None and segment.valid is None
            if is_plain and number not in state.masks and number not in state.shifts:
                return kwargs  # nothing is padding, and positions go on from the prompt's
        if index in self._keyless:  # a state's mask is 2-D: the padding of this pass alone
            if segment.slots is None:
                return kwargs
            if forward.past and segment.valid is not None:
                refuse_padding_after_state(self._decoder.layers[index], index)
            return {**kwargs, "attention_mask": segment.valid, **other_arguments(forward, kwargs)}
        sources = (kwargs.get("attention_mask"), kwargs.get("position_embeddings"))
        # made once per stage, and again where a model has several kinds of layers
        arguments = None if asked else segment.made_from(*sources)
        if arguments is None:
            keys = layer_keys(forward, number, index, cache, hidden_states, len(self._stage_layers), self._config)
            kind = () if self._kinds is None else (self._kinds[index],)
            arguments = shortened_arguments(self._decoder, forward, keys, hidden_states, kwargs, kind)
            if not asked:
                segment.made.append((sources, arguments))
        return {**kwargs, **arguments, **other_arguments(forward, kwargs)}

    # -- the end ---------------------------------------------------------------------------------------------------

    def finish(self, forward: ForwardPass, output: BaseModelOutputWithPast) -> Survivors | None:
        """Scatter the survivors' states back to the prompt's length, so that callers see the shape they asked for."""
        slots = slots_of(forward, forward.current)
        if slots is None:
            return None
        output["last_hidden_state"] = scatter_back(output.last_hidden_state, slots, forward.length)
        if output.get("hidden_states"):
            num_layers = self._config.num_hidden_layers
            output["hidden_states"] = scatter_all(output.hidden_states, forward, self._stage_layers, num_layers)
        return Survivors(forward.length, slots)


def drops_nothing(visual: Visual, counts: tuple[int, ...]) -> bool:
    """Tell whether a stage keeps all tokens that are left."""
    return counts == visual.counts


def carried_arguments(kwargs: Mapping[str, Any], hidden_states: Tensor) -> dict[str, Any]:
    """Find the arguments of a layer whose rows the stage can gather along: positions, and rotary tables."""
    batch, device = len(hidden_states), hidden_states.device
    found: dict[str, Any] = {}
    positions, tables = kwargs.get("position_ids"), kwargs.get("position_embeddings")
    parts = (tables,) if isinstance(tables, Tensor) else tables if isinstance(tables, tuple | list) else ()

    def fits(part: object, ndims: tuple[int, ...], rows: int) -> bool:
        if not isinstance(part, Tensor) or part.ndim not in ndims or part.device != device:
            return False
        return part.shape[rows] in (1, batch)

    if fits(positions, (2, 3), -2) and positions.dtype in (torch.int64, torch.int32):  # type: ignore[union-attr]
        found["position_ids"] = positions
    if 0 < len(parts) <= 3 and all(fits(part, (3,), 0) for part in parts):
        found["position_embeddings"] = tables
    return found


def selection(forward: ForwardPass, stage: Stage, decision: Decision, counts: tuple[int, ...]) -> Tensor:
    """Turn a decision into scores [P, V], or logits [P, V, 2], whose top-k in the *row* are the survivors."""
    visual, prompts = forward.visual, forward.prompts
    if decision.keep_mask is not None:
        if prompts.run is not None:
            raise ValueError(
                f"schedule: share='image', but {type(stage.policy).__name__} chooses by a keep mask of its own; use "
                "share='row'"
            )
        return torch.where(decision.keep_mask > 0, 1.0, -1.0)
    scores = decision.scores.detach()
    if prompts.run is not None or forward.segment.packing is not None:
        return torch.where(top_mask(scores, visual.valid, counts, forward), 1.0, -1.0)
    return scores if scores.is_floating_point() else scores.float()


def top_mask(scores: Tensor, valid: Tensor, counts: tuple[int, ...], shared: ForwardPass | None = None) -> Tensor:
    """Mark the ``counts`` best of each prompt: bool [P, V]; ties go to the lower slot.

    ``shared`` is a pass whose images may have shares of the counts.
    """
    scores = score_difference(scores).float()
    if shared is None or shared.prompts.run is None:
        segments, k = None, on_device(counts, scores.device)
    else:
        segments = shared.prompts.run.gather(1, shared.visual.index.clamp(min=0))
        k = shared.shares(counts, scores.device)
    best = topk_compact(scores[..., None], scores, k, valid_mask=valid, segments=segments, max_length=max(counts))
    width = valid.shape[1]
    keep = torch.zeros(len(valid), width + 1, dtype=torch.bool, device=scores.device)
    return keep.scatter(1, best.indices.masked_fill(~best.valid_mask, width), True)[:, :width]
