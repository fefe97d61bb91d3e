"""Mask mode: nothing is removed; attention follows Eqs. 6-7, through transformers' AttentionInterface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from toprl_kernels import AttentionPlan, attention_plan, masked_attention
from toprl_models.policy import Decision
from toprl_models.runtime.cache import CacheState, cache_of, cache_state, extend_mask
from toprl_models.runtime.compact import selection, top_mask
from toprl_models.runtime.outputs import Survivors
from toprl_models.runtime.prompt import open_slots
from toprl_models.runtime.stage import Stage, trace_of
from toprl_models.runtime.state import ForwardPass, Segment, Visual, put, visual_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPast

NAME = "toprl_masked"
# Arguments of an attention call that change no number: the mask has the window
HARMLESS = frozenset({"sliding_window", "is_causal", "layer_idx", "output_attentions", "use_cache", "position_ids"})


@dataclass
class KeepArgument:
    """A layer's keyword argument ``toprl_keep``, on its way to the layer's attention function."""

    keep_mask: Tensor | None  # [B, L] over all keys, those in the cache included; None keeps all
    bounded_grad: bool  # the policy's bounded_mask_grad
    layer_arguments: frozenset[str]  # names that the layer was called with; it makes the attention's other arguments
    # shared by the layers between two stages: one plan per attention mask, number of keys and device
    plans: list[tuple[Tensor | None, AttentionPlan]]
    arrived: bool = False  # whether the attention function was called with this argument

    def plan(self, attention_mask: Tensor | None, key: Tensor) -> AttentionPlan | None:
        """Return the plan that an earlier layer made of this mask for as many keys, or make it; None keeps all."""
        if self.keep_mask is None:
            return None
        wanted = (key.shape[2], key.device)
        for mask, plan in self.plans:
            if mask is attention_mask and (plan.keep_mask.shape[1], plan.keep_mask.device) == wanted:
                return plan
        # a layer with a sliding window has cached the last tokens alone
        keep_mask = self.keep_mask[:, -key.shape[2] :].to(key.device)
        self.plans.append((attention_mask, make_plan(keep_mask, attention_mask)))
        return self.plans[-1][1]


class Mask:
    """Mode that masks dropped tokens in attention; all tokens stay in the sequence and in the cache."""

    name = "mask"

    def __init__(self) -> None:
        self._implementation: str | None = None

    def install(self, model: PreTrainedModel) -> None:
        """Switch the decoder of ``model`` to masked attention."""
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(NAME, toprl_masked_forward)
        AttentionMaskInterface.register(NAME, padding_mask)
        self._implementation = model.config.get_text_config()._attn_implementation
        model.set_attn_implementation({"text_config": NAME})

    def uninstall(self, model: PreTrainedModel) -> None:
        """Give ``model`` back the attention that it had."""
        if self._implementation is not None:
            model.set_attn_implementation({"text_config": self._implementation})
            self._implementation = None

    def at_stage(
        self,
        forward: ForwardPass,
        stage: Stage,
        hidden_states: Tensor,
        decision: Decision,
        counts: tuple[int, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Make the keep mask of the next segment; states change only where a policy merges tokens."""
        visual, before = forward.visual, forward.segment
        if before.packing is not None:
            raise ValueError(
                'mode="mask" makes one mask per row, and several prompts are packed into a row: use '
                'mode="compact", or give each prompt a row of its own'
            )
        keep = decision.keep_mask
        if keep is None or forward.prompts.run is not None:
            keep = top_mask(selection(forward, stage, decision, counts), visual.valid, counts)
        alive = (keep.detach() > 0) & visual.valid
        # differentiable masks keep their gradient
        keep = alive if keep.dtype == torch.bool else keep * visual.valid
        full = torch.ones(forward.prompts.is_visual.shape, dtype=keep.dtype, device=keep.device)
        full = put(full, visual.slots, visual.index >= 0, keep, None)
        if decision.states is not None and counts != visual.counts:
            hidden_states = put(hidden_states, visual.slots, visual.valid, decision.states, None)
        forward.visual = Visual(visual.slots, alive, visual.index, counts)
        number = stage.number + 1
        forward.segments[number], forward.current = Segment(valid=before.valid, keep_mask=full), number
        indices = visual_of(visual.index.masked_fill(~alive, -1), counts, None).index  # without the dropped columns
        forward.trace.append(trace_of(stage, forward, visual, decision, indices, counts))
        return hidden_states

    def before_layer(
        self, forward: ForwardPass, number: int, index: int, hidden_states: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Add the keep mask over all keys of this layer, those in the cache included.

        ``number`` is the segment that layer ``index`` runs in; the next segment while the layer is asked for scores.
        """
        segment, asked = forward.segment, number != forward.current
        if asked or not segment.made:
            cache = cache_of(kwargs)
            past = cache.get_seq_length(index) if cache is not None else 0
            state: CacheState | None = getattr(cache, "_toprl_state", None)
            if state is not None and not past:  # the cache was reset
                state.masks.pop(number, None)
            stored = state.masks.get(number) if state is not None else None
            keep = extend_mask(stored, segment.keep_mask, past, hidden_states)
            if not asked:
                segment.made.append(((), {"keep": keep, "plans": []}))
                if forward.prunes and cache is not None and keep is not None:
                    cache_state(cache).masks[number] = keep.detach()
        else:
            keep = segment.made[0][1]["keep"]
        plans = [] if asked else segment.made[0][1]["plans"]
        argument = KeepArgument(keep, forward.bounded_mask_grad, frozenset(kwargs), plans)
        if not asked:
            forward.sent[index] = argument
        return {**kwargs, "toprl_keep": argument}

    def finish(self, forward: ForwardPass, output: BaseModelOutputWithPast) -> Survivors | None:
        """Check that every layer was masked; nothing was removed, so that nothing is scattered."""
        for index, argument in forward.sent.items():
            if not argument.arrived:
                raise RuntimeError(
                    f"decoder layer {index} did not hand its keyword arguments on to its attention function, so that "
                    'nothing was masked there: mode="mask" cannot support this decoder, use mode="compact"'
                )
        full = forward.segment.keep_mask
        if full is None or forward.visual.counts == forward.num_visual:
            return None
        kept = full.detach() > 0
        kept = kept if forward.segment.valid is None else kept & forward.segment.valid
        slots = torch.arange(forward.length, device=kept.device)
        return Survivors(forward.length, slots.where(kept, forward.length))


def toprl_masked_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    toprl_keep: KeepArgument | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by Eqs. 6-7, as an attention function of transformers: [B, H, Nq, D] to ([B, Nq, H, D], None).

    ``attention_mask`` is what ``padding_mask`` made. Without ``toprl_keep``, before the first stage, all tokens stay.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            'output_attentions=True: mask mode computes no attention matrix; use mode="compact" and '
            'model.set_attn_implementation("eager")'
        )
    if dropout:
        raise ValueError(f"dropout={dropout}: mask mode has no attention dropout; put the model in eval mode")
    if toprl_keep is not None:
        toprl_keep.arrived = True
        known = toprl_keep.layer_arguments | HARMLESS
        unknown = {name: value for name, value in kwargs.items() if value is not None and name not in known}
        if unknown:
            raise ValueError(
                f"{type(module).__name__} gives {', '.join(unknown)} to its attention function, which Eq. 7 has not: "
                'mode="mask" cannot support this model, use mode="compact"'
            )
    if attention_mask is not None:  # a static cache has free slots after the tokens
        key, value = (states[:, :, : attention_mask.shape[-1]] for states in (key, value))
    plan = None if toprl_keep is None else toprl_keep.plan(attention_mask, key)
    if plan is None:
        every = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        plan = make_plan(every, attention_mask)
    bounded = toprl_keep is not None and toprl_keep.bounded_grad
    output = masked_attention(query, key, value, plan=plan, scale=scaling, bounded_mask_grad=bounded)
    return output.transpose(1, 2).contiguous(), None


def make_plan(keep_mask: Tensor, attention_mask: Tensor | None) -> AttentionPlan:
    """Plan attention over ``keep_mask`` [B, N] under a mask of the model: 2-D padding (causal), 4-D, or None (causal).

    In a 4-D mask [B, 1, n, N] each token must see all keys of an interval, but for padding, and the intervals' ends
    must not decrease: so it is with windows, chunks, and blocks of tokens that see each other.
    """
    if attention_mask is None or attention_mask.ndim == 2:
        return attention_plan(keep_mask, attention_mask, is_causal=True)
    visible = open_slots(attention_mask).expand(len(keep_mask), -1, -1)
    real = visible.any(1)  # the keys that anybody sees
    length, past = visible.shape[2], visible.shape[2] - visible.shape[1]
    keys = torch.arange(length, device=visible.device)
    # rows of padding take the ends of the rows beside them
    low = torch.where(visible, keys, length).amin(2).flip(1).cummin(1).values.flip(1)
    high = torch.where(visible, keys + 1, past).amax(2).cummax(1).values
    itself = visible.diagonal(past, 1, 2)
    as_ranges = (low[..., None] <= keys) & (keys < high[..., None]) & real[:, None]
    if bool(((as_ranges != visible) & itself[..., None]).any() | ~itself.any()):
        raise ValueError(
            "attention_mask is 4-D, and what a token sees there is no interval of tokens around it, or the mask has "
            'other columns than the tokens so far: mode="mask" cannot support it, use mode="compact" or a 2-D mask'
        )
    before = torch.stack([torch.zeros_like(keys[:past]), keys[:past] + 1], 1).expand(len(keep_mask), -1, -1)
    ranges = torch.cat([before, torch.stack([low, high], 2)], 1).int()
    return attention_plan(keep_mask, real, ranges=ranges)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    mask_function: Callable[..., Tensor] | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the 2-D padding mask itself, bool ``[B, n]``, as mask maker of ``toprl_masked``; the kernel is causal.

    n are the tokens seen so far, without those that a layer with a window has let go: a static cache is longer, and a
    mask must tell n. Where the model asks for another pattern than causality, its 4-D mask is returned,
    ``[B, 1, q_length, n]``.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    length = int(q_offset) + q_length
    mask = None if attention_mask is None else attention_mask[:, :length].bool()
    if mask is not None and mask.shape[1] < length:
        mask = pad(mask, (0, length - mask.shape[1]), value=False)
    if mask_function is not None and mask_function is not causal_mask_function:
        options = kwargs | {"device": device, "allow_is_causal_skip": False, "attention_mask": mask}
        options |= {"q_offset": q_offset, "kv_offset": kv_offset}
        asked, causal = (
            sdpa_mask(batch_size, q_length, length - kv_offset, mask_function=function, **options)
            for function in (mask_function, causal_mask_function)
        )
        differs = asked != causal  # a window that is longer than the sequence is no other pattern
        if mask is not None:  # what padding sees does not matter
            differs = differs & mask[:, None, -q_length:, None]
        if bool(differs.any()):
            return asked
    if mask is None:
        if length - kv_offset == kv_length:
            return None
        return torch.ones(batch_size, length - kv_offset, dtype=torch.bool, device=device)
    return mask[:, kv_offset:]
