"""What the pruner does at one stage: the state of a forward pass and the two ways to act on a decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from toprl_kernels import topk_compact
from toprl_models.policy import Decision, Policy, PromptEmbeddings, StageContext, TextStates
from toprl_models.runtime.scores import gather_slots, query_attention
from toprl_models.schedule import Schedule


@dataclass(frozen=True)
class StageTrace:
    """What one stage did in the last prefill.

    Attributes:
        stage, layer: which stage, before which decoder layer.
        num_visual: original visual tokens per sample.
        counts: tokens kept per sample.
        indices: int64 ``[B, max(counts)]``, raster numbers of the kept tokens, ascending, -1 where a row is shorter.
        scores: the policy's scores ``[B, V]``; ``visual_index`` ``[B, V]`` tells the raster number of each column.
    """

    stage: int
    layer: int
    num_visual: tuple[int, ...]
    counts: tuple[int, ...]
    indices: Tensor
    scores: Tensor
    visual_index: Tensor


@dataclass
class Visual:
    """Which slots are visual: ``slots`` [B, V] points into the sequence (0 where ``valid`` is False)."""

    slots: Tensor
    valid: Tensor
    index: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, ordinal: Tensor, counts: tuple[int, ...]) -> Visual:
        """From ``ordinal`` [B, N]: the raster number of each slot, -1 where it is not visual."""
        width = max(counts)
        slots = (ordinal < 0).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        valid = ordinal.gather(1, slots) >= 0
        return cls(slots.masked_fill(~valid, 0), valid, ordinal.gather(1, slots), counts)


@dataclass
class Entry:
    """The prompt as it enters layer 0, B samples and N tokens."""

    embeddings: Tensor  # [B, N, d]
    visual: Visual
    is_visual: Tensor  # bool [B, N]
    is_behind: Tensor  # bool [B, N]: text behind the sample's last visual token
    num_behind: int  # of the sample that has most
    inputs: Mapping[str, Any]  # keyword arguments of the model

    def behind(self, flags: Tensor) -> tuple[Tensor, Tensor]:
        """Slots [B, R] of the tokens behind the images where ``flags`` [B, n] marks them, and which of them are any."""
        slots = (~flags).to(torch.int8).argsort(dim=1, stable=True)[:, : self.num_behind]
        return slots, flags.gather(1, slots)


@dataclass
class Segment:
    """How the layers behind one stage see the sequence of this forward pass."""

    indices: Tensor | None = None  # [B, m] slots of the previous segment that survive; None when all do
    valid: Tensor | None = None  # [B, m], None when all slots are valid
    attention_mask: Any = None
    position_embeddings: Any = None
    keep_mask: Tensor | None = None  # mask mode: [B, N] over the tokens of this pass
    compacted: Tensor | None = None  # the new states, until the stage's layer takes them
    own: tuple[Any, Any] | None = None  # compact mode: the model's mask and tables that they were made from
    shift: Tensor | None = None  # int64 [B]: how far positions moved down before this pass, where they are renumbered
    ready: bool = False  # mask mode: attention_mask is made at the segment's first layer


@dataclass
class ForwardPass:
    """State of one forward pass through the decoder."""

    prunes: bool
    length: int = 0  # tokens of this pass
    past: int = 0  # tokens of the sequence before this pass
    drafted: int = 0  # last tokens of this pass that are a draft, not the prompt
    settled: int = 0  # length of the sequence up to the last visual token of this pass
    ends_visual: tuple[bool, ...] = ()  # samples whose prompt ends in a visual token
    past_valid: Tensor | None = None  # bool [B, past] of the tokens in the cache before this pass
    entry: Entry | None = None
    ordinal: Tensor | None = None  # [B, n] of the current segment
    visual: Visual | None = None
    num_visual: tuple[int, ...] = ()
    num_text: tuple[int, ...] = ()
    valid: Tensor | None = None  # [B, n] of the current segment
    position_embeddings: Any = None  # of the current segment
    layer_input: Tensor | None = None  # what went into the layer before the next stage
    rebuilt_from: Any = None  # the model's mask that was found to be causal
    segments: dict[int, Segment] = field(default_factory=dict)
    trace: list[StageTrace] = field(default_factory=list)


def composed_indices(forward: ForwardPass, number: int) -> Tensor | None:
    """Slots of the original sequence that segment ``number`` holds, None for all."""
    composed = None
    for earlier in range(1, number + 1):
        indices = forward.segments[earlier].indices if earlier in forward.segments else None
        if indices is not None:
            composed = indices if composed is None else composed.gather(1, indices)
    return composed


def moved_positions(
    forward: ForwardPass, composed: Tensor, valid: Tensor | None, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Positions of the survivors, consecutive again, and how far they moved down at the end of the row.

    Args:
        composed: int64 [B, m], slots of the prompt that survive.
        valid: bool [B, m], False for padding among them; None when there is none.
        positions: int64 [B or 1, N] of the prompt.

    Returns:
        int64 [B, m] and [B].
    """
    entry = forward.entry
    assert entry is not None
    real = torch.ones_like(composed, dtype=torch.bool) if valid is None else valid
    kept = torch.zeros_like(entry.is_visual).to(torch.int8).scatter_add(1, composed, real.to(torch.int8)) > 0
    before = (entry.is_visual & ~kept).cumsum(1)
    positions = positions.expand(len(composed), -1).gather(1, composed)
    return positions - before.gather(1, composed), before[:, -1]


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64 ``[n]``; the host does not wait for the device, as it does in ``torch.tensor(numbers, device=device)``."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def last_slots(valid: Tensor | None, like: Tensor, drafted: int = 0) -> Tensor:
    """int64 ``[B]``: slot of each sample's last prompt token in ``like`` [B, N, ...]; a draft stands behind it."""
    batch, length = like.shape[:2]
    end = length - 1 - drafted
    if valid is None:
        return torch.full((batch,), end, device=like.device)
    return (length - 1 - valid.flip(1).to(torch.int8).argmax(1)).clamp(max=end)


def stage_context(
    forward: ForwardPass, stage: int, hidden_states: Tensor, policy: Policy, schedule: Schedule, layers: nn.ModuleList
) -> StageContext:
    """What the policy gets to see at ``stage``."""
    visual, valid = forward.visual, forward.valid
    assert visual is not None
    last = last_slots(valid, hidden_states, forward.drafted)
    layer, entry = schedule.layers[stage], forward.entry
    assert entry is not None

    def attention(queries: Tensor) -> Tensor:
        current = policy.attention_from == "current"
        source = hidden_states if current else forward.layer_input
        if source is None:
            raise RuntimeError("the attention needs attention_from='current' or 'previous' on the policy class")
        seen = valid
        keep = forward.segments[stage].keep_mask if stage else None
        if keep is not None:  # mask mode: dropped tokens are no keys
            seen = (keep > 0) if seen is None else seen & (keep > 0)
        chosen = layers[layer if current else layer - 1]
        weights = query_attention(chosen, source, forward.position_embeddings, queries, seen)
        return weights.gather(2, visual.slots[:, None].expand(-1, queries.shape[1], -1))

    def text_slots() -> tuple[Tensor, Tensor]:
        composed = composed_indices(forward, stage)
        here = entry.is_behind if composed is None else entry.is_behind.gather(1, composed)
        return entry.behind(here if valid is None else here & valid)

    def text_states() -> TextStates:
        if any(forward.ends_visual):
            raise ValueError(
                f"input_ids: row {forward.ends_visual.index(True)} ends in a visual token, so that there is no text "
                "behind the images whose states a policy could see: append the question; with prefill_chunk_size, "
                "choose a size that leaves it in the images' chunk (or None)"
            )
        slots, are_text = text_slots()
        return TextStates(gather_slots(hidden_states, slots).masked_fill(~are_text[..., None], 0), are_text)

    def text_attention() -> Tensor:
        queries, are_text = text_slots()
        return attention(queries).masked_fill(~are_text[..., None], 0)

    def prompt() -> PromptEmbeddings:
        text, are_text = entry.behind(entry.is_behind)
        visual_states, text_states = (gather_slots(entry.embeddings, slots) for slots in (entry.visual.slots, text))
        return PromptEmbeddings(
            visual_states.masked_fill(~entry.visual.valid[..., None], 0),
            entry.visual.valid,
            text_states.masked_fill(~are_text[..., None], 0),
            are_text,
        )

    return StageContext(
        stage=stage,
        layer=layer,
        hidden_states=gather_slots(hidden_states, visual.slots),
        valid_mask=visual.valid,
        visual_index=visual.index,
        num_visual=forward.num_visual,
        num_keep=tuple(
            min(schedule.counts(n)[stage], left) for n, left in zip(forward.num_visual, visual.counts, strict=True)
        ),
        text_state=hidden_states[torch.arange(len(hidden_states), device=last.device), last],
        last_attention=lambda: attention(last[:, None])[:, 0],
        text_attention=text_attention,
        prompt=prompt,
        inputs=entry.inputs,
        text_states=text_states,
    )


def check_decision(policy: Policy, decision: Decision, context: StageContext) -> None:
    """Refuse scores, masks or states of another shape than the state's."""
    expected = {name: context.valid_mask.shape for name in ("scores", "keep_mask")}
    for name, shape in (expected | {"states": context.hidden_states.shape}).items():
        value = getattr(decision, name)
        if value is not None and value.shape != shape:
            raise ValueError(
                f"policy {type(policy).__name__}: {name} has shape {tuple(value.shape)}, not {tuple(shape)}"
            )


def with_states(hidden_states: Tensor, visual: Visual, states: Tensor | None) -> Tensor:
    """``hidden_states`` [B, N, d] with ``states`` [B, V, d] in the visual slots."""
    if states is None:
        return hidden_states
    length = hidden_states.shape[1]
    slots = visual.slots.masked_fill(~visual.valid, length)[..., None].expand_as(states)
    return pad(hidden_states, (0, 0, 0, 1)).scatter(1, slots, states.to(hidden_states.dtype))[:, :length]


def refuse_to_drop_the_end(forward: ForwardPass, counts: tuple[int, ...]) -> None:
    """Refuse to prune a prompt that ends in a visual token: there is no question, and its last state could vanish."""
    assert forward.visual is not None
    for row, (ends, count, left) in enumerate(zip(forward.ends_visual, counts, forward.visual.counts, strict=True)):
        if ends and count < left:
            raise ValueError(
                f"input_ids: row {row} ends in a visual token. Pruning needs the text behind the images in the same "
                "forward pass: append it; with prefill_chunk_size, choose a size that cuts no image (or None)"
            )


def run_stage(
    forward: ForwardPass,
    number: int,
    hidden_states: Tensor,
    policy: Policy,
    schedule: Schedule,
    layers: nn.ModuleList,
    mode: str,
) -> None:
    """Ask the policy, turn its decision into segment ``number`` and trace it."""
    visual = forward.visual
    assert visual is not None
    context = stage_context(forward, number - 1, hidden_states, policy, schedule, layers)
    decision = policy.decide(context)
    check_decision(policy, decision, context)
    counts = context.num_keep
    if decision.keep_mask is not None:
        counts = tuple((decision.keep_mask.detach() > 0).logical_and(visual.valid).sum(1).tolist())
    refuse_to_drop_the_end(forward, counts)
    step = mask_stage if mode == "mask" else compact_stage
    segment = step(forward, hidden_states, decision, counts)
    forward.segments[number] = segment
    forward.layer_input = None
    after = forward.visual
    assert after is not None
    indices = after.index.masked_fill(~after.valid, -1)
    if mode == "mask":  # the visual slots stay; compact the survivors' numbers for the trace
        indices = Visual.of(indices, counts).index if any(counts) else indices[:, :0]
    forward.trace.append(
        StageTrace(
            stage=number - 1,
            layer=schedule.layers[number - 1],
            num_visual=forward.num_visual,
            counts=counts,
            indices=indices,
            scores=decision.scores.detach(),
            visual_index=visual.index,
        )
    )


def compact_stage(forward: ForwardPass, hidden_states: Tensor, decision: Decision, counts: tuple[int, ...]) -> Segment:
    visual, ordinal = forward.visual, forward.ordinal
    assert visual is not None and ordinal is not None
    if counts == visual.counts:  # nothing drops: no gather, so keep-all is bitwise the unattached model
        return Segment(valid=forward.valid)
    hidden_states = with_states(hidden_states, visual, decision.states)
    batch, length = ordinal.shape
    if decision.keep_mask is None:
        # a policy's own +inf must not push out text, which is +inf too
        scores = decision.scores.float().nan_to_num(nan=float("nan"), posinf=torch.finfo(torch.float32).max)
    else:
        scores = torch.where(decision.keep_mask > 0, 1.0, -1.0)
    # [B, n]: text is always kept; the column behind the end takes what visual padding writes
    slot_scores = scores.new_full((batch, length + 1), float("inf"))
    slots = visual.slots.masked_fill(~visual.valid, length)
    slot_scores = slot_scores.scatter(1, slots, scores)[:, :length].contiguous()
    totals = [text + keep for text, keep in zip(forward.num_text, counts, strict=True)]
    ragged = len(set(totals)) > 1
    if ragged:
        # generation reads the last position: shorter rows are padded on the left
        kept = topk_compact(
            hidden_states,
            slot_scores,
            on_device(totals, hidden_states.device),
            valid_mask=forward.valid,
            max_length=max(totals),
            padding_side="left",
        )
        valid, indices = kept.valid_mask, kept.indices.masked_fill(~kept.valid_mask, 0)
    else:
        kept = topk_compact(hidden_states, slot_scores, totals[0], valid_mask=forward.valid)
        valid, indices = None, kept.indices
    compacted = kept.hidden_states
    forward.valid = valid
    new_ordinal = ordinal.gather(1, indices)
    forward.ordinal = new_ordinal if valid is None else new_ordinal.masked_fill(~valid, -1)
    forward.visual = Visual.of(forward.ordinal, counts)
    return Segment(indices=indices, valid=valid, compacted=compacted)


def mask_stage(forward: ForwardPass, hidden_states: Tensor, decision: Decision, counts: tuple[int, ...]) -> Segment:
    visual = forward.visual
    assert visual is not None and forward.ordinal is not None
    keep = decision.keep_mask
    if keep is None:
        k = on_device(counts, hidden_states.device)
        scores = decision.scores.detach()
        best = topk_compact(scores[..., None], scores.float(), k, valid_mask=visual.valid, max_length=max(counts))
        keep = torch.zeros(visual.valid.shape[0], visual.valid.shape[1] + 1, dtype=torch.bool, device=k.device)
        keep = keep.scatter(1, best.indices.masked_fill(~best.valid_mask, keep.shape[1] - 1), True)[:, :-1]
    alive = (keep.detach() > 0) & visual.valid
    if keep.dtype != torch.bool:
        keep = keep * visual.valid  # differentiable masks keep their gradient
    else:
        keep = alive
    batch, length = forward.ordinal.shape
    slots = torch.where(visual.index >= 0, visual.slots, length)  # padding writes behind the end
    full = torch.ones(batch, length + 1, dtype=keep.dtype, device=keep.device)
    full = full.scatter(1, slots, keep)[:, :length]
    changed = decision.states is not None and counts != visual.counts
    forward.visual = Visual(visual.slots, alive, visual.index, counts)
    return Segment(keep_mask=full, compacted=with_states(hidden_states, visual, decision.states) if changed else None)
