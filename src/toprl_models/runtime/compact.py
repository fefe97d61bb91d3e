"""Compact mode: before a stage's layer the survivors are gathered; later layers run on the short sequence.

They write short key/value caches, and get the mask, positions and rotary tables of the survivors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toprl_kernels import topk_compact
from toprl_models.policy import Decision
from toprl_models.runtime.cache import enter_cache, layer_keys, remove_before_first_layer
from toprl_models.runtime.guards import first_attention, recurrent_layers, refuse_padding_after_state
from toprl_models.runtime.outputs import Survivors, scatter_all, scatter_back, slots_of
from toprl_models.runtime.shortened import shortened_arguments
from toprl_models.runtime.stage import Stage, shared_by_image, trace_of
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
        self._config, self._first_attention = decoder.config, first_attention(decoder.config)
        self._recurrent = recurrent_layers(decoder.config)

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
            hidden_states, after = self._gather(forward, stage, hidden_states, decision, counts)
            indices = forward.visual.index
        forward.segments[number], forward.current = after, number
        removed = before_length - hidden_states.shape[1]
        cache = kwargs.get("past_key_values")
        if self._stage_layers[stage.number] <= self._first_attention and removed and cache is not None:
            enter_cache(forward, cache, len(self._stage_layers))
            remove_before_first_layer(cache, removed)
        forward.trace.append(trace_of(stage, forward, before_visual, decision, indices, counts))
        return hidden_states

    def _gather(
        self, forward: ForwardPass, stage: Stage, hidden_states: Tensor, decision: Decision, counts: tuple[int, ...]
    ) -> tuple[Tensor, Segment]:
        visual, ordinal, before = forward.visual, forward.ordinal, forward.segment
        packing = before.packing
        if decision.states is not None:
            hidden_states = put(hidden_states, visual.slots, visual.valid, decision.states, packing)
        # text is always kept: +inf, which a policy's own +inf must not push out
        scores = selection(forward, stage, decision, counts)
        text_scores = scores.new_full(ordinal.shape, float("inf"))
        slot_scores = put(text_scores, visual.slots, visual.valid, scores, packing).contiguous()
        dropped = [present - kept for present, kept in zip(visual.counts, counts, strict=True)]
        rows = range(len(counts)) if packing is None else packing.rows
        totals = list(forward.row_tokens)
        for row, count in zip(rows, dropped, strict=True):
            totals[row] -= count
        if len(set(totals)) > 1:
            # generation reads the last position: shorter rows are padded on the left
            kept = topk_compact(
                hidden_states,
                slot_scores,
                on_device(totals, hidden_states.device),
                valid_mask=before.valid,
                max_length=max(totals),
                padding_side="left",
            )
            valid, indices = kept.valid_mask, kept.indices.masked_fill(~kept.valid_mask, 0)
        else:
            kept = topk_compact(hidden_states, slot_scores, totals[0], valid_mask=before.valid)
            valid, indices = None, kept.indices
        after = Segment(indices if before.slots is None else before.slots.gather(1, indices), valid)
        if packing is not None:
            after.packing = Packing(packing.number.gather(1, indices), packing.rows, packing.row_index)
        self._move(before, after, indices, ordinal, dropped, self._renumbers[stage.number])
        forward.row_tokens = tuple(totals)
        ordinal = ordinal.gather(1, indices)
        forward.ordinal = ordinal if valid is None else ordinal.masked_fill(~valid, -1)
        forward.visual = visual_of(forward.ordinal, counts, after.packing)
        return kept.hidden_states, after

    def _move(
        self, before: Segment, after: Segment, indices: Tensor, ordinal: Tensor, dropped: list[int], renumbers: bool
    ) -> None:
        """Note how far the survivors' positions move down."""
        after.shift = before.shift
        if before.moved is not None:
            after.moved = before.moved.gather(1, indices)
        if not renumbers:
            return
        real = torch.ones_like(indices) if after.valid is None else after.valid.long()
        kept = torch.zeros_like(ordinal).scatter_add(1, indices, real) > 0
        gone = ((ordinal >= 0) & ~kept).cumsum(1)
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
        cache = kwargs.get("past_key_values")
        segment, asked = forward.segment, number != forward.current
        if not forward.prunes:
            state = getattr(cache, "_toprl_state", None)
            if state is None:
                return kwargs  # this cache was filled without pruning: the model's own mask fits
            is_plain = kwargs.get("attention_mask") is None and segment.valid is None
            if is_plain and number not in state.masks and number not in state.shifts:
                return kwargs  # nothing is padding, and positions go on from the prompt's
        if index in self._recurrent:  # its mask is 2-D: the padding of this pass alone
            if segment.slots is None:
                return kwargs
            if forward.past and segment.valid is not None:
                refuse_padding_after_state(self._decoder.layers[index], index)
            return {**kwargs, "attention_mask": segment.valid}
        made_from = (kwargs.get("attention_mask"), kwargs.get("position_embeddings"))
        # made once per stage, and again where a model has several kinds of layers
        if not asked and segment.is_made_from(*made_from):
            return {**kwargs, **segment.arguments}
        keys = layer_keys(forward, number, index, cache, hidden_states, len(self._stage_layers), self._config)
        arguments = shortened_arguments(self._decoder, forward, keys, hidden_states, kwargs)
        if not asked:
            segment.made_from, segment.arguments = made_from, arguments
        return {**kwargs, **arguments}

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


def selection(forward: ForwardPass, stage: Stage, decision: Decision, counts: tuple[int, ...]) -> Tensor:
    """Turn a decision into scores [P, V] float32 whose top-k in the *row* are the survivors; finite or -inf."""
    visual, prompts = forward.visual, forward.prompts
    if decision.keep_mask is not None:
        if prompts.run is not None:
            raise ValueError(
                f"schedule: share='image', but {type(stage.policy).__name__} chooses by a keep mask of its own; use "
                "share='row'"
            )
        return torch.where(decision.keep_mask > 0, 1.0, -1.0)
    scores = decision.scores.detach()
    if prompts.run is not None:
        scores = shared_by_image(scores, visual, prompts)
    if forward.segment.packing is not None:
        return torch.where(top_mask(scores, visual.valid, counts), 1.0, -1.0)
    return scores.float().nan_to_num(nan=float("nan"), posinf=torch.finfo(torch.float32).max)


def top_mask(scores: Tensor, valid: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Mark the ``counts`` best of each prompt: bool [P, V]; ties go to the lower slot."""
    best = topk_compact(
        scores[..., None], scores.float(), on_device(counts, scores.device), valid_mask=valid, max_length=max(counts)
    )
    width = valid.shape[1]
    keep = torch.zeros(len(valid), width + 1, dtype=torch.bool, device=scores.device)
    return keep.scatter(1, best.indices.masked_fill(~best.valid_mask, width), True)[:, :width]
