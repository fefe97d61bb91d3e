"""attach(): prune visual tokens inside the decoder of a transformers model, by hooks alone.

``compact`` mode removes tokens: before a stage's layer the survivors are gathered, later layers run on the short
sequence and write short key/value caches. ``mask`` mode removes nothing: attention follows Eqs. 6-7 of the paper. Both
give the same numbers on surviving tokens, and no model code or class is patched.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from toprl_models import masking
from toprl_models.attention import LayerView, gather_slots, prefill_mask, rebuild_mask
from toprl_models.families import decoder_of, family_of, min_stage_of, visual_token_ids
from toprl_models.policy import Policy
from toprl_models.schedule import Schedule
from toprl_models.stages import (
    CacheState,
    ForwardPass,
    Segment,
    StageTrace,
    Visual,
    cache_state,
    composed_indices,
    extend_mask,
    run_stage,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mode = Literal["compact", "mask"]
# Decoders that are hooked now, so that a second attach is refused.
_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Pruner:
    """Prunes the visual tokens of one model until detached; made by ``attach``."""

    def __init__(self, model: PreTrainedModel, policy: Policy, schedule: Schedule, mode: Mode) -> None:
        self.model, self.policy, self.schedule, self.mode = model, policy, schedule, mode
        family = family_of(model)
        self._ids = torch.tensor(visual_token_ids(model, family))
        self._decoder = decoder_of(model)
        self._layers: nn.ModuleList = self._decoder.layers  # type: ignore[assignment]
        self._stage_at = {layer: stage for stage, layer in enumerate(schedule.layers)}
        self._forward: ForwardPass | None = None
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
            self._forward = ForwardPass(prunes=False)
            return
        visual, valid = pending
        if visual is None:
            self._forward = ForwardPass(prunes=False, valid=None if valid is None or bool(valid.all()) else valid)
            return
        everything = torch.ones_like(visual) if valid is None else valid
        visual = visual & everything
        # the one host synchronisation of a prefill whose stages keep fixed counts
        counts = torch.stack([visual.sum(1), everything.sum(1)]).tolist()
        num_visual, num_valid = tuple(counts[0]), tuple(counts[1])
        if not any(num_visual):
            self._forward = ForwardPass(prunes=False)
            self.trace = []
            return
        ordinal = torch.where(visual, visual.cumsum(1) - 1, -1)
        self._forward = ForwardPass(
            prunes=True,
            length=visual.shape[1],
            ordinal=ordinal,
            visual=Visual.of(ordinal, num_visual),
            num_visual=num_visual,
            num_text=tuple(n - v for n, v in zip(num_valid, num_visual, strict=True)),
            valid=None if min(num_valid) == visual.shape[1] else valid,
        )

    def _before_layer(
        self, index: int, number: int, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        forward = self._forward
        if forward is None:
            return None
        hidden_states = args[0] if args else kwargs["hidden_states"]
        changed = dict(kwargs)
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
        composed = composed_indices(forward, len(self.schedule))
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

    def _at_stage(self, forward: ForwardPass, number: int, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if number in forward.segments:  # gradient checkpointing runs the hook again: same decision, same gather
            indices = forward.segments[number].indices
            return hidden_states if indices is None else gather_slots(hidden_states, indices)
        if forward.position_embeddings is None:
            forward.position_embeddings = kwargs["position_embeddings"]
        run_stage(forward, number, hidden_states, self.policy, self.schedule, self._layers, self.mode)
        segment = forward.segments[number]
        compacted, segment.compacted = segment.compacted, None
        return hidden_states if compacted is None else compacted

    def _shorten(
        self, forward: ForwardPass, number: int, index: int, hidden_states: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Compact mode: swap mask, rotary tables and positions for those of the short sequence."""
        cache = kwargs.get("past_key_values")
        state: CacheState | None = getattr(cache, "_toprl_state", None)
        if not forward.prunes and state is None:
            return  # this cache was filled without pruning: the model's own mask fits
        segment = forward.segments.setdefault(number, Segment(valid=forward.valid))
        if not segment.ready:
            segment.ready = True
            past = cache.get_seq_length(index) if cache is not None else 0
            composed = composed_indices(forward, number)
            if composed is None:
                segment.position_embeddings = kwargs["position_embeddings"]
            else:
                tables = kwargs["position_embeddings"]
                segment.position_embeddings = tuple(gather_slots(table, composed) for table in tables)
            forward.position_embeddings = segment.position_embeddings
            if forward.prunes and cache is not None:
                state = cache_state(cache)
            stored = state.masks.get(number) if state is not None and past else None
            valid = extend_mask(stored, segment.valid, past, hidden_states)
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

    def _keep_mask(
        self, forward: ForwardPass, number: int, index: int, cache: Any, hidden_states: Tensor
    ) -> Tensor | None:
        """Mask mode: keep mask over all keys of this layer, those in the cache included."""
        segment = forward.segments.setdefault(number, Segment())
        if not segment.ready:
            segment.ready = True
            past = cache.get_seq_length(index) if cache is not None else 0
            state: CacheState | None = getattr(cache, "_toprl_state", None)
            stored = state.masks.get(number) if state is not None and past else None
            segment.attention_mask = extend_mask(stored, segment.keep_mask, past, hidden_states)
            if forward.prunes and cache is not None and segment.attention_mask is not None:
                cache_state(cache).masks[number] = segment.attention_mask.detach()
        return segment.attention_mask


class _LayerHook:
    """The pre-hook of one decoder layer (a class, because the layer's number must come along)."""

    def __init__(self, pruner: Pruner, index: int) -> None:
        self.pruner, self.index = pruner, index
        self.number = sum(layer <= index for layer in pruner.schedule.layers)  # stages at or before this layer

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        try:
            return self.pruner._before_layer(self.index, self.number, args, kwargs)
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
    first = min_stage_of(model, family)
    if schedule.layers[0] < first:
        raise ValueError(
            f"schedule: first stage at layer {schedule.layers[0]}, but {type(model).__name__} can prune before layer "
            f"{first} at the earliest"
        )
    policy.check(model, schedule)
    return Pruner(model, policy, schedule, mode)
