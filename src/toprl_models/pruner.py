"""attach(): prune visual tokens inside the decoder of a transformers model, by hooks alone.

``compact`` mode removes tokens: before a stage's layer the survivors are gathered, later layers run on the short
sequence and write short key/value caches. ``mask`` mode removes nothing: attention follows Eqs. 6-7 of the paper. Both
give the same numbers on surviving tokens, and no model code or class is patched.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from toprl_kernels import topk_compact
from toprl_models import masking
from toprl_models.attention import LayerView, gather_slots, last_query_attention, prefill_mask, rebuild_mask
from toprl_models.families import decoder_of, family_of, visual_token_ids
from toprl_models.policy import Decision, Policy, StageContext
from toprl_models.schedule import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mode = Literal["compact", "mask"]
# Decoders that are hooked now, so that a second attach is refused.
_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


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
class _Visual:
    """Which slots are visual: ``slots`` [B, V] points into the sequence (0 where ``valid`` is False)."""

    slots: Tensor
    valid: Tensor
    index: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, ordinal: Tensor, counts: tuple[int, ...]) -> _Visual:
        """From ``ordinal`` [B, N]: the raster number of each slot, -1 where it is not visual."""
        width = max(counts)
        slots = (ordinal < 0).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        valid = ordinal.gather(1, slots) >= 0
        return cls(slots.masked_fill(~valid, 0), valid, ordinal.gather(1, slots), counts)


@dataclass
class _Segment:
    """How the layers behind one stage see the sequence of this forward pass."""

    indices: Tensor | None = None  # [B, m] slots of the previous segment that survive; None when all do
    valid: Tensor | None = None  # [B, m], None when all slots are valid
    attention_mask: Any = None
    position_embeddings: Any = None
    keep_mask: Tensor | None = None  # mask mode: [B, N] over the tokens of this pass
    compacted: Tensor | None = None  # the gathered states, until the stage's layer takes them
    ready: bool = False  # attention_mask and position_embeddings are made at the segment's first layer


@dataclass
class _Forward:
    """State of one forward pass through the decoder."""

    prunes: bool
    length: int = 0  # tokens of this pass
    ordinal: Tensor | None = None  # [B, n] of the current segment
    visual: _Visual | None = None
    num_visual: tuple[int, ...] = ()
    num_text: tuple[int, ...] = ()
    valid: Tensor | None = None  # [B, n] of the current segment
    position_embeddings: Any = None  # of the current segment
    layer_input: Tensor | None = None  # what went into the layer before the next stage
    segments: dict[int, _Segment] = field(default_factory=dict)
    trace: list[StageTrace] = field(default_factory=list)


@dataclass
class _CacheState:
    """Kept with the cache object: per segment, validity (compact) or keep mask (mask) of the tokens seen so far.

    A segment that is absent, and every token behind the stored ones, counts as valid.
    """

    masks: dict[int, Tensor] = field(default_factory=dict)


class Pruner:
    """Prunes the visual tokens of one model until detached; made by ``attach``."""

    def __init__(self, model: PreTrainedModel, policy: Policy, schedule: Schedule, mode: Mode) -> None:
        self.model, self.policy, self.schedule, self.mode = model, policy, schedule, mode
        family = family_of(model)
        self._ids = torch.tensor(visual_token_ids(model, family))
        self._decoder = decoder_of(model)
        self._layers: nn.ModuleList = self._decoder.layers  # type: ignore[assignment]
        self._stage_at = {layer: stage for stage, layer in enumerate(schedule.layers)}
        self._forward: _Forward | None = None
        self._pending: tuple[Tensor | None, Tensor | None] | None = None  # visual and valid masks of this pass
        self._enabled = True
        self._handles: list[Any] = []
        self._attention: str | None = None
        self.trace: list[StageTrace] = []
        self._hook()

    # -- life cycle ----------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        add, base = self._handles.append, self.model.base_model
        _ATTACHED.add(self._decoder)
        add(base.register_forward_pre_hook(self._before_model, with_kwargs=True))
        add(base.register_forward_hook(self._after_model, always_call=True))
        add(self._decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        add(self._decoder.register_forward_hook(self._after_decoder))
        first = self.schedule.layers[0] - (self.policy.attention_from == "previous")
        for index in range(first, len(self._layers)):
            hook = _LayerHook(self, index)
            add(self._layers[index].register_forward_pre_hook(hook, with_kwargs=True))
        if self.mode == "mask":
            self._attention = masking.install(self.model)

    def detach(self) -> None:
        """Remove every hook and restore the attention implementation; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._attention is not None:
            masking.restore(self.model, self._attention)
            self._attention = None
        _ATTACHED.discard(self._decoder)
        self._forward = self._pending = None

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def __enter__(self) -> Pruner:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model behaves as if it was not attached; caches of pruned prompts do not mix in."""
        was, self._enabled = self._enabled, False
        attention = self._attention
        if attention is not None:
            masking.restore(self.model, attention)
        try:
            yield
        finally:
            self._enabled = was
            if attention is not None:
                masking.install(self.model)

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Find the visual tokens - only if images came along: a *generated* token may carry the image id."""
        self._pending = self._forward = None
        if not self._enabled:
            return
        images = any(v is not None for k, v in kwargs.items() if k.startswith("pixel_values"))
        images = images or bool(kwargs.get("mm_encoder_outputs"))
        input_ids = args[0] if args else kwargs.get("input_ids")
        if not images and (input_ids is None or input_ids.shape[1] == 1):
            return
        if input_ids is None:
            raise ValueError(
                "input_ids is None: the pruner finds visual tokens by their placeholder ids; pass input_ids, not "
                "inputs_embeds, together with images"
            )
        visual = torch.isin(input_ids, self._ids.to(input_ids.device)) if images else None
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):
            raise TypeError("attention_mask is a dict of prepared masks; pass the 2-D padding mask")
        valid = mask[:, -input_ids.shape[1] :].bool() if mask is not None and mask.ndim == 2 else None
        self._pending = (visual, valid)

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._enabled:
            return
        pending, self._pending = self._pending, None
        if pending is None:
            self._forward = _Forward(prunes=False)
            return
        visual, valid = pending
        if visual is None:
            self._forward = _Forward(prunes=False, valid=None if valid is None or bool(valid.all()) else valid)
            return
        everything = torch.ones_like(visual) if valid is None else valid
        visual = visual & everything
        # the one host synchronisation of a prefill whose stages keep fixed counts
        counts = torch.stack([visual.sum(1), everything.sum(1)]).tolist()
        num_visual, num_valid = tuple(counts[0]), tuple(counts[1])
        if not any(num_visual):
            self._forward = _Forward(prunes=False)
            self.trace = []
            return
        ordinal = torch.where(visual, visual.cumsum(1) - 1, -1)
        self._forward = _Forward(
            prunes=True,
            length=visual.shape[1],
            ordinal=ordinal,
            visual=_Visual.of(ordinal, num_visual),
            num_visual=num_visual,
            num_text=tuple(n - v for n, v in zip(num_valid, num_visual, strict=True)),
            valid=None if min(num_valid) == visual.shape[1] else valid,
        )

    def _before_layer(self, index: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        forward = self._forward
        if forward is None:
            return None
        hidden_states = args[0] if args else kwargs["hidden_states"]
        changed = dict(kwargs)
        number = sum(layer <= index for layer in self.schedule.layers)  # stages behind us
        if forward.prunes:
            if index in self._stage_at:
                hidden_states = self._at_stage(forward, number, hidden_states, kwargs)
            if self.policy.attention_from == "previous" and index + 1 in self._stage_at:
                forward.layer_input = hidden_states
                if forward.position_embeddings is None:
                    forward.position_embeddings = kwargs.get("position_embeddings")
        if number:
            cache = kwargs.get("past_key_values")
            if self.mode == "mask":
                changed["toprl_keep_mask"] = self._keep_mask(forward, number, index, cache, hidden_states)
            else:
                self._shorten(forward, number, index, hidden_states, changed)
        if args:
            return (hidden_states, *args[1:]), changed
        changed["hidden_states"] = hidden_states
        return args, changed

    def _after_decoder(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Scatter the survivors' states back to the prompt's length, so that callers see the shape they asked for."""
        forward = self._forward
        if forward is None or not forward.prunes:
            return None
        self.trace = forward.trace
        if self.mode == "mask":
            return None
        composed = self._composed(forward, len(self.schedule))
        if composed is None:
            return None
        states, valid, length = output.last_hidden_state, forward.valid, forward.length
        if valid is not None:
            states = states.masked_fill(~valid[..., None], 0)
            # padding slots all point at slot 0: send them to one slot too many, cut off below
            composed = composed.masked_fill(~valid, length)
        full = states.new_zeros(len(states), length + 1, states.shape[-1])
        full = full.scatter(1, composed[..., None].expand_as(states), states)
        output["last_hidden_state"] = full[:, :length]
        return output

    def _after_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._forward = self._pending = None

    # -- stages --------------------------------------------------------------------------------------------------

    def _at_stage(self, forward: _Forward, number: int, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if number in forward.segments:  # gradient checkpointing runs the hook again: same decision, same gather
            indices = forward.segments[number].indices
            return hidden_states if indices is None else gather_slots(hidden_states, indices)
        self._run_stage(forward, number, hidden_states, kwargs)
        segment = forward.segments[number]
        compacted, segment.compacted = segment.compacted, None
        return hidden_states if compacted is None else compacted

    def _run_stage(self, forward: _Forward, number: int, hidden_states: Tensor, kwargs: dict[str, Any]) -> None:
        """Ask the policy and turn its decision into the next segment."""
        visual, ordinal = forward.visual, forward.ordinal
        assert visual is not None and ordinal is not None
        if forward.position_embeddings is None:
            forward.position_embeddings = kwargs["position_embeddings"]
        context = self._context(forward, number - 1, hidden_states)
        decision = self.policy.decide(context)
        self._check_decision(decision, context)
        counts = context.num_keep
        if decision.keep_mask is not None:
            counts = tuple((decision.keep_mask.detach() > 0).logical_and(visual.valid).sum(1).tolist())
        step = self._mask_stage if self.mode == "mask" else self._compact_stage
        segment = step(forward, hidden_states, decision, counts)
        forward.segments[number] = segment
        forward.layer_input = None
        after = forward.visual
        assert after is not None
        indices = after.index.masked_fill(~after.valid, -1)
        if self.mode == "mask":  # the visual slots stay; compact the survivors' numbers for the trace
            indices = _Visual.of(indices, counts).index if any(counts) else indices[:, :0]
        forward.trace.append(
            StageTrace(
                stage=number - 1,
                layer=self.schedule.layers[number - 1],
                num_visual=forward.num_visual,
                counts=counts,
                indices=indices,
                scores=decision.scores.detach(),
                visual_index=visual.index,
            )
        )

    def _context(self, forward: _Forward, stage: int, hidden_states: Tensor) -> StageContext:
        visual, valid = forward.visual, forward.valid
        assert visual is not None
        length = hidden_states.shape[1]
        if valid is None:
            last = torch.full((len(hidden_states),), length - 1, device=hidden_states.device)
        else:
            last = length - 1 - valid.flip(1).to(torch.int8).argmax(1)
        layer = self.schedule.layers[stage]

        def last_attention() -> Tensor:
            source = hidden_states if self.policy.attention_from == "current" else forward.layer_input
            if source is None:
                raise RuntimeError("last_attention() needs attention_from='current' or 'previous' on the policy class")
            seen = valid
            keep = forward.segments[stage].keep_mask if stage else None
            if keep is not None:  # mask mode: dropped tokens are no keys
                seen = (keep > 0) if seen is None else seen & (keep > 0)
            weights = last_query_attention(self._layers[layer - 1], source, forward.position_embeddings, last, seen)
            return weights.gather(1, visual.slots)

        return StageContext(
            stage=stage,
            layer=layer,
            hidden_states=gather_slots(hidden_states, visual.slots),
            valid_mask=visual.valid,
            visual_index=visual.index,
            num_visual=forward.num_visual,
            num_keep=tuple(
                min(self.schedule.counts(n)[stage], left)
                for n, left in zip(forward.num_visual, visual.counts, strict=True)
            ),
            text_state=hidden_states[torch.arange(len(hidden_states), device=last.device), last],
            last_attention=last_attention,
        )

    def _check_decision(self, decision: Decision, context: StageContext) -> None:
        shape = tuple(context.valid_mask.shape)
        for name, value in (("scores", decision.scores), ("keep_mask", decision.keep_mask)):
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(
                    f"policy {type(self.policy).__name__}: {name} has shape {tuple(value.shape)}, not {shape}"
                )

    def _compact_stage(
        self, forward: _Forward, hidden_states: Tensor, decision: Decision, counts: tuple[int, ...]
    ) -> _Segment:
        visual, ordinal = forward.visual, forward.ordinal
        assert visual is not None and ordinal is not None
        if counts == visual.counts:  # nothing drops: no gather, so keep-all is bitwise the unattached model
            return _Segment(valid=forward.valid)
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
        k = torch.tensor(totals, device=hidden_states.device) if ragged else totals[0]
        compacted, indices, *_ = topk_compact(hidden_states, slot_scores, k, valid_mask=forward.valid)
        valid = None
        if ragged:
            # generation reads the last position: shorter rows are padded on the left
            width = max(totals)
            shift = width - torch.tensor(totals, device=indices.device)
            source = torch.arange(width, device=indices.device) - shift[:, None]
            valid = source >= 0
            indices = indices.gather(1, source.clamp(min=0)).masked_fill(~valid, 0)
            compacted = gather_slots(hidden_states, indices)
        forward.valid = valid
        new_ordinal = ordinal.gather(1, indices)
        forward.ordinal = new_ordinal if valid is None else new_ordinal.masked_fill(~valid, -1)
        forward.visual = _Visual.of(forward.ordinal, counts)
        return _Segment(indices=indices, valid=valid, compacted=compacted)

    def _mask_stage(
        self, forward: _Forward, hidden_states: Tensor, decision: Decision, counts: tuple[int, ...]
    ) -> _Segment:
        visual = forward.visual
        assert visual is not None and forward.ordinal is not None
        keep = decision.keep_mask
        if keep is None:
            k = torch.tensor(counts, device=hidden_states.device)
            best = topk_compact(
                decision.scores.detach()[..., None], decision.scores.float(), k, valid_mask=visual.valid
            )
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
        forward.visual = _Visual(visual.slots, alive, visual.index, counts)
        return _Segment(keep_mask=full)

    def _shorten(
        self, forward: _Forward, number: int, index: int, hidden_states: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Compact mode: swap mask, rotary tables and positions for those of the short sequence."""
        cache = kwargs.get("past_key_values")
        state: _CacheState | None = getattr(cache, "_toprl_state", None)
        if not forward.prunes and state is None:
            return  # this cache was filled without pruning: the model's own mask fits
        segment = forward.segments.setdefault(number, _Segment(valid=forward.valid))
        if not segment.ready:
            segment.ready = True
            past = cache.get_seq_length(index) if cache is not None else 0
            composed = self._composed(forward, number)
            if composed is None:
                segment.position_embeddings = kwargs["position_embeddings"]
            else:
                tables = kwargs["position_embeddings"]
                segment.position_embeddings = tuple(gather_slots(table, composed) for table in tables)
            forward.position_embeddings = segment.position_embeddings
            if forward.prunes and cache is not None:
                state = _state_of(cache)
            stored = state.masks.get(number) if state is not None and past else None
            valid = self._extend(stored, segment.valid, past, hidden_states)
            original = kwargs.get("attention_mask")
            if original is None and valid is None:
                segment.attention_mask = None
            elif forward.prunes and not past and composed is None:
                segment.attention_mask = original
            elif forward.prunes and not past and isinstance(original, Tensor) and original.ndim == 4:
                segment.attention_mask = prefill_mask(original, composed, segment.valid)
            else:
                view = None if cache is None else LayerView(cache, index)
                segment.attention_mask = rebuild_mask(self._decoder.config, hidden_states, valid, view)
            if state is not None and (forward.prunes or segment.valid is not None):
                state.masks.pop(number, None)
                if valid is not None:
                    state.masks[number] = valid
        kwargs["attention_mask"] = segment.attention_mask
        kwargs["position_embeddings"] = segment.position_embeddings
        # positions with gaps would be read as packed sequences by the flash path
        kwargs["position_ids"] = None

    @staticmethod
    def _extend(stored: Tensor | None, new: Tensor | None, past: int, hidden_states: Tensor) -> Tensor | None:
        """Mask over ``past`` cached tokens and those of this pass; tokens that neither mask covers count as 1."""
        if not past:
            return new
        if stored is None and new is None:
            return None
        some = new if new is not None else stored
        assert some is not None
        known = 0 if stored is None else min(past, stored.shape[1])  # decoding may have been rolled back
        batch, length = hidden_states.shape[:2]
        ones = torch.ones(batch, past - known + length, dtype=some.dtype, device=some.device)
        parts = [] if stored is None else [stored[:, :known].to(some.dtype)]
        parts += [ones] if new is None else [ones[:, : past - known], new]
        return torch.cat(parts, 1)

    def _composed(self, forward: _Forward, number: int) -> Tensor | None:
        """Slots of the original sequence that segment ``number`` holds, None for all."""
        composed = None
        for earlier in range(1, number + 1):
            indices = forward.segments[earlier].indices if earlier in forward.segments else None
            if indices is not None:
                composed = indices if composed is None else composed.gather(1, indices)
        return composed

    def _keep_mask(
        self, forward: _Forward, number: int, index: int, cache: Any, hidden_states: Tensor
    ) -> Tensor | None:
        """Mask mode: keep mask over all keys of this layer, those in the cache included."""
        segment = forward.segments.setdefault(number, _Segment())
        if not segment.ready:
            segment.ready = True
            past = cache.get_seq_length(index) if cache is not None else 0
            state: _CacheState | None = getattr(cache, "_toprl_state", None)
            stored = state.masks.get(number) if state is not None and past else None
            segment.attention_mask = self._extend(stored, segment.keep_mask, past, hidden_states)
            if forward.prunes and cache is not None and segment.attention_mask is not None:
                _state_of(cache).masks[number] = segment.attention_mask.detach()
        return segment.attention_mask


def _state_of(cache: Any) -> _CacheState:
    if not hasattr(cache, "_toprl_state"):
        cache._toprl_state = _CacheState()
    return cache._toprl_state


class _LayerHook:
    """The pre-hook of one decoder layer (a class, because the layer's number must come along)."""

    def __init__(self, pruner: Pruner, index: int) -> None:
        self.pruner, self.index = pruner, index

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        try:
            return self.pruner._before_layer(self.index, args, kwargs)
        except TypeError as error:
            # transformers answers a TypeError by running the forward again without some arguments
            raise RuntimeError(f"pruning before layer {self.index} failed: {error}") from error


def attach(model: PreTrainedModel, policy: Policy, *, schedule: Schedule, mode: Mode = "compact") -> Pruner:
    """Prune the visual tokens of ``model`` with ``policy`` at the stages of ``schedule``.

    Args:
        model: a supported transformers model (see ``toprl_models.families``).
        policy: scores visual tokens; a ``TopRLPolicy`` or a baseline.
        schedule: which layers keep how many tokens.
        mode: "compact" removes tokens and their keys and values; "mask" keeps all and masks attention (Eqs. 6-7).

    Returns:
        The ``Pruner``; a context manager that detaches on leaving. A prompt without visual tokens is not pruned.

    Raises:
        TypeError: unsupported model class; ``policy`` is not a Policy, ``schedule`` not a Schedule.
        ValueError: unknown mode, a stage outside the decoder, a policy that does not fit the model.
        RuntimeError: the model is attached already.

    Example:
        >>> with attach(model, FastV(), schedule=Schedule(((2, 0.5),))) as pruner:
        ...     output = model.generate(**inputs)
    """
    family = family_of(model)
    if not isinstance(policy, Policy):
        raise TypeError(f"policy is a {type(policy).__name__}, not a toprl_models.Policy")
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule is a {type(schedule).__name__}; pass Schedule(stages=((layer, keep), ...))")
    if mode not in ("compact", "mask"):
        raise ValueError(f'mode={mode!r} must be "compact" or "mask"')
    decoder = decoder_of(model)
    if decoder in _ATTACHED:
        raise RuntimeError("model is attached already; call .detach() on its Pruner (or leave its with block) first")
    schedule.check_layers(len(decoder.layers))  # type: ignore[arg-type]
    if schedule.layers[0] < family.min_stage:
        raise ValueError(f"schedule: first stage at layer {schedule.layers[0]}, must be at least {family.min_stage}")
    policy.check(model, schedule)
    return Pruner(model, policy, schedule, mode)
