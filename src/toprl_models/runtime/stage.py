"""A stage: what the policy may look at, and its decision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toprl_models.policy import Decision, Policy, PromptEmbeddings, StageContext, TextStates
from toprl_models.runtime.scores import HeadGroup, Observation
from toprl_models.runtime.state import ForwardPass, Length, Prompts, Segment, StageTrace, Visual, listed, take
from toprl_models.schedule import Schedule

# Rows of attention that are in memory at a time, of all heads
QUERIES_AT_ONCE = 64


@dataclass
class Observed:
    """An observed attention call, and what its mask does not say."""

    call: Observation
    past: Length  # keys that were cached before
    keep_mask: Tensor | None = None  # mask mode: [B, L] over all keys

    def __post_init__(self) -> None:
        if isinstance(self.past, int):  # a layer with a sliding window has let the oldest keys go
            self.past = min(self.past, self.call.key.shape[2] - self.call.query.shape[2])


@dataclass
class Stage:
    """One stage of an attached model: its policy, and how it sees the model.

    Attributes:
        number: 0-based.
        observe: returns the attention call that ``policy.attention_from`` names; None where it is "none".
        heads: the ranks of tensor parallelism.
    """

    number: int
    policy: Policy
    schedule: Schedule
    heads: HeadGroup
    observe: Callable[[], Observed] | None = None

    def __post_init__(self) -> None:
        self.attention_from = self.policy.attention_from  # hooks depend on it, so that it stays while attached

    def decide(self, forward: ForwardPass, hidden_states: Tensor) -> tuple[Decision, tuple[int, ...]]:
        """Ask the policy for its decision, alike on all ranks, and for the tokens that each prompt keeps."""
        context = self.context(forward, hidden_states)
        # a policy that reads no question may prune a prompt that goes on later
        checks = self.policy.uses_text or forward.prompts.end_from == "the prompt of generate()"
        if checks:
            refuse_without_question(forward, context.num_keep)
        decision = self.policy.decide(context)
        check_decision(self.policy, decision, context)
        keep_mask = decision.keep_mask
        if keep_mask is not None and not keep_mask.requires_grad:
            keep_mask = self.heads.agree(keep_mask)
        decision = decision._replace(scores=self.heads.agree(decision.scores), keep_mask=keep_mask)
        counts = context.num_keep
        if keep_mask is not None:
            counts = tuple((keep_mask.detach() > 0).logical_and(context.valid_mask).sum(1).tolist())
            if checks:
                refuse_without_question(forward, counts)
        return decision, counts

    def context(self, forward: ForwardPass, hidden_states: Tensor) -> StageContext:
        """Gather what the policy may look at; what costs something is a function that the policy may call."""
        # held here, so that a context stays what it was when the pass goes on
        visual, prompts, segment, observe = forward.visual, forward.prompts, forward.segment, self.observe
        packing = segment.packing

        @functools.cache
        def last_slots() -> Tensor:
            return _last_slots(segment, prompts.last)

        def observed() -> Observed:
            if observe is None:
                raise RuntimeError(
                    "the attention needs attention_from='current' or 'previous' on the policy class "
                    f"{type(self.policy).__name__}"
                )
            return observe()

        def attention(queries: Tensor, heads: str = "mean") -> Tensor:
            seen = observed()
            weights = seen.call.weights(queries, seen.past, packing, seen.keep_mask, heads)
            columns = (visual.slots + seen.past)[:, None].expand(-1, queries.shape[1], -1).to(weights.device)
            over_ranks = self.heads.mean if heads == "mean" else self.heads.largest
            return over_ranks(weights.gather(2, columns)).to(hidden_states.device)

        def text_slots() -> tuple[Tensor, Tensor]:
            refuse_without_question(forward)
            flags = prompts.is_text if segment.slots is None else prompts.is_text.gather(1, segment.slots)
            return listed(flags if segment.valid is None else flags & segment.valid, prompts.num_text, packing)

        def text_states() -> TextStates:
            slots, valid = text_slots()
            return TextStates(take(hidden_states, slots, packing).masked_fill(~valid[..., None], 0), valid)

        def text_attention() -> Tensor:
            queries, valid = text_slots()
            return attention(queries).masked_fill(~valid[..., None], 0)

        def peak_attention() -> tuple[Tensor, Tensor]:
            def received(queries: Tensor, valid: Tensor) -> Tensor:
                total = torch.zeros(visual.valid.shape, device=hidden_states.device)
                for part in torch.arange(queries.shape[1], device=queries.device).split(QUERIES_AT_ONCE):
                    total += (attention(queries[:, part], "max") * valid[:, part, None]).sum(1)
                return total

            return received(*text_slots()), received(visual.slots, visual.valid)

        def key_norms() -> tuple[Tensor, Tensor]:
            seen, (text, valid) = observed(), text_slots()
            norms = self.heads.mean(seen.call.key.float().abs().sum(-1).mean(1)).to(hidden_states.device)
            of_visual, of_text = (
                take(norms[..., None], slots + seen.past, packing)[..., 0] for slots in (visual.slots, text)
            )
            return of_visual, of_text.masked_fill(~valid, 0)

        return _Context(
            later={
                "hidden_states": lambda: take(hidden_states, visual.slots, packing),
                "text_state": lambda: take(hidden_states, last_slots()[:, None], packing)[:, 0],
            },
            stage=self.number,
            layer=self.schedule.layers[self.number],
            valid_mask=visual.valid,
            visual_index=visual.index,
            num_visual=forward.num_visual,
            num_keep=tuple(
                min(self.schedule.counts(n)[self.number], left)
                for n, left in zip(forward.num_visual, visual.counts, strict=True)
            ),
            last_attention=lambda: attention(last_slots()[:, None])[:, 0],
            text_attention=text_attention,
            prompt=lambda: prompt_embeddings(forward, prompts),
            inputs=prompts.inputs,
            text_states=text_states,
            key_norms=key_norms,
            peak_attention=peak_attention,
            sequence=hidden_states if packing is None else None,
            slots=visual.slots if packing is None else None,
        )


class _Context(StageContext):
    """Context whose states are gathered when a policy first asks for them."""

    def __init__(self, later: dict[str, Callable[[], Tensor]] | None = None, **known: Any) -> None:
        vars(self).update(known, _later=later or {})

    def __getattr__(self, name: str) -> Tensor:
        later = vars(self).get("_later", {})
        if name not in later:
            raise AttributeError(f"StageContext has no attribute {name!r}")
        vars(self)[name] = later[name]()
        return vars(self)[name]


def refuse_without_question(forward: ForwardPass, counts: tuple[int, ...] | None = None) -> None:
    """Refuse prompts that end in a visual token; with ``counts``, those that would lose any of their tokens."""
    prompts, present = forward.prompts, forward.visual.counts
    for prompt, (num_text, num_visual) in enumerate(zip(prompts.num_text, forward.num_visual, strict=True)):
        if num_visual and not num_text and (counts is None or counts[prompt] < present[prompt]):
            raise ValueError(
                f"input_ids: prompt {prompt} ends in a visual token (its end is that of {prompts.end_from}), so there "
                "is no question that a policy could read: append it, or give prompt_length=; with prefill_chunk_size, "
                "choose a size that leaves the question in the images' chunk (or None)"
            )


def _last_slots(segment: Segment, last: Tensor) -> Tensor:
    """Find the slot [P] of each prompt's ``last`` token in a segment."""
    slots, packing = segment.slots, segment.packing
    if slots is None:
        return last
    slots = slots if packing is None else slots[packing.row_index]
    return (slots == last[:, None]).to(torch.int8).argmax(1)


def prompt_embeddings(forward: ForwardPass, prompts: Prompts) -> PromptEmbeddings:
    """Gather the embeddings that entered layer 0."""
    packing = forward.segments[0].packing
    text, text_valid = listed(prompts.is_text, prompts.num_text, packing)
    visual, valid = prompts.visual.slots, prompts.visual.valid
    return PromptEmbeddings(
        take(prompts.embeddings, visual, packing).masked_fill(~valid[..., None], 0),
        valid,
        take(prompts.embeddings, text, packing).masked_fill(~text_valid[..., None], 0),
        text_valid,
    )


def check_decision(policy: Policy, decision: Decision, context: StageContext) -> None:
    """Refuse scores, masks or states whose shape is not that of the visual tokens."""
    shape = tuple(context.valid_mask.shape)
    given = decision._asdict()
    planes = {f"deepstack[{number}]": plane for number, plane in enumerate(given.pop("deepstack"))}
    for name, value in (given | planes).items():
        trailing = () if value is None or name == "keep_mask" else tuple(value.shape[2:])
        if (name == "states" and value is not None) or name in planes:
            trailing = tuple(context.hidden_states.shape[2:])
        elif trailing != (2,):
            trailing = ()
        if value is not None and value.shape != (*shape, *trailing):
            raise ValueError(
                f"policy {type(policy).__name__}: {name} has shape {tuple(value.shape)}, not {(*shape, *trailing)}"
            )


def trace_of(
    stage: Stage, forward: ForwardPass, before: Visual, decision: Decision, indices: Tensor, counts: tuple[int, ...]
) -> StageTrace:
    """Make the record of a stage; ``indices`` [P, W] are the raster numbers of the kept tokens, -1 for padding."""
    layer, decided = stage.schedule.layers[stage.number], decision.scores.detach()
    return StageTrace(stage.number, layer, forward.num_visual, counts, indices, decided, before.index)
