"""attach(): prune visual tokens inside the decoder of a transformers model, by hooks alone.

``compact`` mode removes tokens: before a stage's layer the survivors are gathered, later layers run on the short
sequence and write short key/value caches. ``mask`` mode removes nothing: attention follows Eqs. 6-7 of the paper. Both
give the same numbers on surviving tokens, and no model code or class is patched.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from toprl_models.families import decoder_of, family_of, has_kinds_of_positions, has_plain_positions, min_stage_of
from toprl_models.policy import Policy
from toprl_models.runtime import mask as masking
from toprl_models.runtime.cache import CacheState, cache_state, extend_mask, remove_before_first_layer
from toprl_models.runtime.guards import (
    OneForward,
    refuse_checkpointing,
    refuse_packed,
    refuse_several_devices,
    refuse_window,
    sliding_window,
)
from toprl_models.runtime.outputs import Survivors, scatter_all, scatter_back, without_dropped
from toprl_models.runtime.prompt import Prompt, VisualIds, begin, drafted_tokens, read_prompt
from toprl_models.runtime.scores import (
    LayerView,
    gather_tables,
    is_static_step,
    prefill_mask,
    rebuild_mask,
    refuse_views_ahead,
    static_step_mask,
)
from toprl_models.runtime.stage import (
    ForwardPass,
    Segment,
    StageTrace,
    composed_indices,
    moved_positions,
    run_stage,
)
from toprl_models.schedule import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mode = Literal["compact", "mask"]
# Decoders that are hooked now, so that a second attach is refused.
_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _PerThread(threading.local):
    """What is remembered before and after the base model's forward pass, when other threads may come between."""

    drafted: int = 0  # of the pass that begins
    survivors: Survivors | None = None  # of the last pass, for its loss


class Pruner:
    """Prunes the visual tokens of one model until detached; made by ``attach``."""

    def __init__(self, model: PreTrainedModel, policy: Policy, schedule: Schedule, mode: Mode) -> None:
        self.model, self.policy, self.schedule, self.mode = model, policy, schedule, mode
        family = family_of(model)
        self._ids = VisualIds.of(model, family)
        self._decoder = decoder_of(model)
        self._layers: nn.ModuleList = self._decoder.layers  # type: ignore[assignment]
        self._stage_at = {layer: stage for stage, layer in enumerate(schedule.layers)}
        self._forward: ForwardPass | None = None
        self._pending: Prompt | None = None
        self._inputs: Mapping[str, Any] = {}  # what the model was called with, until the decoder begins
        self._mine = _PerThread()
        self._running = OneForward()
        self._window = sliding_window(self._decoder.config)
        self._renumbers = policy.positions == "renumbered" and has_plain_positions(self._decoder)
        self._enabled = True
        self._handles: list[Any] = []
        self._attention: str | None = None
        self.trace: list[StageTrace] = []
        self._hook()

    # -- life cycle ----------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        add, base = self._handles.append, self.model.base_model
        _ATTACHED.add(self._decoder)
        add(self.model.register_forward_pre_hook(self._before_top, with_kwargs=True))
        add(base.register_forward_pre_hook(self._before_model, with_kwargs=True))
        add(base.register_forward_hook(self._after_model, always_call=True))
        add(self._decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        add(self._decoder.register_forward_hook(self._after_decoder))
        self._handles += self.policy.hooks(self.model)
        first = self.schedule.layers[0] - (self.policy.attention_from == "previous")
        for index in range(first, len(self._layers)):
            hook = _LayerHook(self, index)
            add(self._layers[index].register_forward_pre_hook(hook, with_kwargs=True))
        # transformers' own place for another loss: model.forward() asks the instance before the class
        self._model_loss, self._own_loss = self.model.loss_function, vars(self.model).get("_loss_function")
        self.model.loss_function = self._loss
        if self.mode == "mask":
            self._attention = masking.install(self.model)

    def detach(self) -> None:
        """Remove every hook and restore the attention implementation; safe to call twice.

        Raises:
            RuntimeError: another thread is in the middle of a forward pass.
        """
        self._running.check()
        for handle in self._handles:
            handle.remove()
        if self._handles and vars(self.model).get("_loss_function") == self._loss:
            del self.model._loss_function
            if self._own_loss is not None:
                self.model.loss_function = self._own_loss
        self._handles.clear()
        if self._attention is not None:
            masking.restore(self.model, self._attention)
            self._attention = None
        _ATTACHED.discard(self._decoder)
        self._forward = self._pending = self._mine.survivors = None

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
        self._running.check()
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

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy of the model would share or duplicate the pruner's state without being attached."""
        raise RuntimeError(
            "a model cannot be copied or pickled while a Pruner is attached: detach() first and attach to the copy, or "
            "save model.state_dict() or model.save_pretrained(folder)"
        )

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _before_top(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._mine.drafted = drafted_tokens(kwargs)

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        drafted, self._mine.drafted = self._mine.drafted, 0
        self._mine.survivors = None
        self._running.enter()
        self._pending = self._forward = None
        if not self._enabled:
            return
        self._pending = read_prompt(self._ids, args, kwargs, drafted, self.model.get_input_embeddings())
        self._inputs = kwargs if self._pending is not None else {}

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._enabled:
            return
        self._running.check()
        prompt, self._pending = self._pending, None
        inputs, self._inputs = self._inputs, {}
        if self._window is not None:
            self._check_window(prompt, kwargs)
        self._forward = begin(prompt, args[0] if args else kwargs["inputs_embeds"], inputs)
        if self._forward.prunes:
            refuse_checkpointing(self._layers, self.mode)

    def _check_window(self, prompt: Prompt | None, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        prunes = prompt is not None and prompt.visual is not None
        if prunes or self.mode == "mask" or hasattr(cache, "_toprl_state"):
            assert self._window is not None
            past = cache.get_seq_length() if cache is not None else 0
            refuse_window(self._window, int(past) + kwargs["inputs_embeds"].shape[1])

    def _before_layer(
        self, index: int, number: int, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        forward = self._forward
        if forward is None:
            if not self._enabled:
                return None
            raise RuntimeError(
                "the layer ran outside of the model's forward pass, where the pruner knows nothing of the prompt: "
                "detach() first; for gradient checkpointing use the model's own, model.gradient_checkpointing_enable()"
            )
        hidden_states = args[0] if args else kwargs["hidden_states"]
        changed = dict(kwargs)
        if forward.prunes:
            if index in self._stage_at:
                before = hidden_states.shape[1]
                hidden_states = self._at_stage(forward, number, hidden_states, kwargs)
                if index == 0 and hidden_states.shape[1] < before and kwargs.get("past_key_values") is not None:
                    remove_before_first_layer(kwargs["past_key_values"], before - hidden_states.shape[1])
            if self.policy.attention_from == "previous" and index + 1 in self._stage_at:
                forward.layer_input = hidden_states
                if not number or self.mode == "mask":  # otherwise _shorten sets them
                    forward.position_embeddings = kwargs["position_embeddings"]
        if number:
            cache = kwargs.get("past_key_values")
            if self.mode == "mask":
                changed["toprl_keep_mask"] = self._keep_mask(forward, number, index, cache, hidden_states)
                changed["toprl_bounded_mask_grad"] = self.policy.bounded_mask_grad
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
        survivors = self._mine.survivors = Survivors.of(forward)
        if self.mode == "mask" or survivors is None:
            return None
        output["last_hidden_state"] = scatter_back(output.last_hidden_state, survivors.slots, forward.length)
        if output.get("hidden_states"):
            num_layers = self.model.config.get_text_config().num_hidden_layers
            output["hidden_states"] = scatter_all(output.hidden_states, forward, self.schedule.layers, num_layers)
        return output

    def _after_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._end_pass()

    def _end_pass(self) -> None:
        if self._running.leave():
            self._forward = self._pending = None
            self._inputs = {}

    def _loss(self, logits: Tensor, labels: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """The model's own loss, where labels that concern dropped tokens are ignored."""
        survivors = self._mine.survivors
        if survivors is not None:
            dropped = survivors.dropped()
            labels = without_dropped(dropped, labels)
            if "shift_labels" in kwargs:
                kwargs["shift_labels"] = without_dropped(dropped, kwargs["shift_labels"], shifted=True)
        return self._model_loss(logits, labels, *args, **kwargs)

    # -- stages --------------------------------------------------------------------------------------------------

    def _at_stage(self, forward: ForwardPass, number: int, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if number == 1 and "flash" in (self._attention or self.model.config.get_text_config()._attn_implementation):
            refuse_packed(kwargs)
        if not any(forward.num_visual):  # images, but all their tokens are padding: a stage that drops nothing
            forward.segments[number] = Segment(valid=forward.valid)
            return hidden_states
        if self.policy.attention_from == "current":
            before, own = forward.segments.get(number - 1), kwargs["position_embeddings"]
            if before is None or before.own is None:
                forward.position_embeddings = own
            elif before.own[1] is not own:  # another kind of layer than the one before
                forward.position_embeddings = gather_tables(own, composed_indices(forward, number - 1))
        with self._running.deciding():
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
        own = (kwargs.get("attention_mask"), kwargs["position_embeddings"])
        if state is not None and not forward.prunes and is_static_step(self._decoder.config, hidden_states, cache):
            if segment.own is None or segment.own[0] is not own[0]:
                segment.attention_mask = static_step_mask(
                    self._decoder.config, hidden_states, state.masks.get(number), LayerView(cache, index)
                )
            segment.own = own
            segment.position_embeddings = self._tables(forward, number, hidden_states, kwargs, None, state)
        # made once per stage, and again where a model has several kinds of layers
        if segment.own is None or segment.own[0] is not own[0] or segment.own[1] is not own[1]:
            segment.own = own
            past = cache.get_seq_length(index) if cache is not None else 0
            composed = composed_indices(forward, number)
            if forward.prunes and cache is not None:
                if state is None and forward.past_valid is not None:  # earlier turns had no images, but padding
                    numbers = range(1, len(self.schedule) + 1)
                    cache_state(cache).masks.update(dict.fromkeys(numbers, forward.past_valid))
                state = cache_state(cache)
                if composed is not None:
                    state.settled = forward.settled
            segment.position_embeddings = self._tables(forward, number, hidden_states, kwargs, composed, state)
            stored = state.masks.get(number) if state is not None and past else None
            valid = extend_mask(stored, segment.valid, past, hidden_states)
            original = own[0]
            if original is None and valid is None:
                segment.attention_mask = None
            elif forward.prunes and not past and composed is None:
                segment.attention_mask = original
            elif composed is not None and not past and isinstance(original, Tensor) and original.ndim == 4:
                segment.attention_mask = prefill_mask(original, composed, segment.valid)
            else:
                view = None if cache is None else LayerView(cache, index)
                if forward.prunes and forward.rebuilt_from is not original:
                    refuse_views_ahead(original, forward.past, forward.length)
                    forward.rebuilt_from = original
                segment.attention_mask = rebuild_mask(self._decoder.config, hidden_states, valid, view)
            if state is not None and (forward.prunes or segment.valid is not None or not past):
                state.masks.pop(number, None)  # not past: the cache was reset
                if valid is not None:
                    state.masks[number] = valid
        forward.position_embeddings = segment.position_embeddings
        kwargs["attention_mask"] = segment.attention_mask
        kwargs["position_embeddings"] = segment.position_embeddings
        # positions with gaps would be read as packed sequences by the flash path
        kwargs["position_ids"] = None

    def _tables(
        self,
        forward: ForwardPass,
        number: int,
        hidden_states: Tensor,
        kwargs: dict[str, Any],
        composed: Tensor | None,
        state: CacheState | None,
    ) -> Any:
        """Compact mode: rotary tables of segment ``number``."""
        if not self._renumbers:
            return gather_tables(kwargs["position_embeddings"], composed)
        segment, positions = forward.segments[number], kwargs["position_ids"]
        if segment.shift is None and state is not None:
            segment.shift = state.shifts.get(number)
        if composed is None and segment.shift is None:
            return kwargs["position_embeddings"]
        if composed is not None:
            positions, moved = moved_positions(forward, composed, segment.valid, positions)
            if state is not None:
                state.shifts[number] = moved if segment.shift is None else segment.shift + moved
        if segment.shift is not None:
            positions = positions - segment.shift[:, None]
        return self._decoder.rotary_emb(hidden_states, positions)  # type: ignore[operator]

    def _keep_mask(
        self, forward: ForwardPass, number: int, index: int, cache: Any, hidden_states: Tensor
    ) -> Tensor | None:
        """Mask mode: keep mask over all keys of this layer, those in the cache included."""
        segment = forward.segments.setdefault(number, Segment())
        if not segment.ready:
            segment.ready = True
            past = cache.get_seq_length(index) if cache is not None else 0
            state: CacheState | None = getattr(cache, "_toprl_state", None)
            if state is not None and not past:  # the cache was reset
                state.masks.pop(number, None)
            stored = state.masks.get(number) if state is not None else None
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
        except KeyboardInterrupt:
            self.pruner._end_pass()  # torch skips the hooks behind the model then
            raise


def attach(model: PreTrainedModel, policy: Policy, *, schedule: Schedule, mode: Mode = "compact") -> Pruner:
    """Prune the visual tokens of ``model`` with ``policy`` at the stages of ``schedule``.

    Args:
        model: a supported transformers model (see ``toprl_models.families``).
        policy: scores visual tokens; a ``TopRLPolicy`` or a baseline.
        schedule: which layers keep how many tokens.
        mode: "compact" removes tokens and their keys and values; "mask" keeps all and masks attention (Eqs. 6-7).

    Returns:
        The ``Pruner``; a context manager that detaches on leaving. A prompt without visual tokens is not pruned.

    A stage decides on the visual tokens of one forward pass. Images of a later turn on the same cache, or of a later
    chunk (``prefill_chunk_size``, which may cut no image), are pruned by themselves, by the same schedule.

    Raises:
        TypeError: unsupported model class; ``policy`` is not a Policy, ``schedule`` not a Schedule.
        ValueError: unknown mode, a stage outside the decoder, a policy that does not fit the model, the schedule or the
            mode, a model that is spread over several devices.
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
    refuse_several_devices(model)
    schedule.check_layers(len(decoder.layers))  # type: ignore[arg-type]
    first = min_stage_of(model, family)
    if schedule.layers[0] < first:
        raise ValueError(
            f"schedule: first stage at layer {schedule.layers[0]}, but {type(model).__name__} can prune before layer "
            f"{first} at the earliest"
        )
    if policy.attention_from == "previous" and not schedule.layers[0]:
        raise ValueError(
            f"schedule: first stage at layer 0, but {type(policy).__name__} reads the attention of the layer before"
        )
    if policy.positions not in ("original", "renumbered"):
        raise ValueError(f'policy.positions={policy.positions!r} must be "original" or "renumbered"')
    if policy.positions == "renumbered" and mode == "mask":
        raise ValueError(
            f'mode="mask" removes nothing, so that positions stay, but {type(policy).__name__} has '
            'positions="renumbered": use mode="compact", or set policy.positions = "original"'
        )
    if policy.positions == "renumbered" and has_kinds_of_positions(decoder):
        raise ValueError(
            f'{type(policy).__name__} has positions="renumbered", which a decoder with several kinds of rotary tables '
            'does not support: set policy.positions = "original"'
        )
    policy.check(model, schedule)
    return Pruner(model, policy, schedule, mode)
