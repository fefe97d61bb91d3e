"""The hooks of an attached model, in the order in which a forward pass meets them."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn

from toprl_models.policy import Policy
from toprl_models.probe import decoder_of
from toprl_models.runtime import guards, scores
from toprl_models.runtime.cache import cache_of
from toprl_models.runtime.compact import Compact, drops_nothing
from toprl_models.runtime.deepstack import take_deepstack
from toprl_models.runtime.mask import Mask
from toprl_models.runtime.outputs import Survivors, without_dropped
from toprl_models.runtime.prompt import Call, FixedPrompt, Generation, Told, VisualIds, begin, read_call, tokens_of
from toprl_models.runtime.stage import Observed, Stage
from toprl_models.runtime.state import ForwardPass, Length, Segment, StageTrace
from toprl_models.schedule import Schedule

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import Cache, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPast

Change = tuple[tuple, dict[str, Any]]


class _PerThread(threading.local):
    """Per-thread state of the current forward pass."""

    told: Told | None = None  # of the call of the whole model, until the base model has it
    calling: Told | None = None  # the same, until the call ends
    prompt_length: int | Tensor | None = None  # of Pruner.prompt_length()
    generation: Generation | None = None
    survivors: Survivors | None = None  # of the last pass, for its loss
    fixed: FixedPrompt | None = None  # of Pruner.fixed_prompt()


class Runtime:
    """State that the hooks of an attached model share."""

    def __init__(
        self, model: PreTrainedModel, policy: Policy, schedule: Schedule, mode: Compact | Mask, ids: VisualIds
    ) -> None:
        self.model, self.schedule, self.mode, self._ids = model, schedule, mode, ids
        self.decoder: PreTrainedModel = decoder_of(model)
        self.layers: nn.ModuleList = self.decoder.layers
        self._decoder_takes = inspect.signature(type(self.decoder).forward).parameters
        heads = scores.HeadGroup(model)
        self.stages = tuple(
            Stage(number, policy.at_stage(number), schedule, heads) for number in range(len(schedule.layers))
        )
        self._stage_at = {layer: stage for layer, stage in zip(schedule.layers, self.stages, strict=True)}
        # layers whose attention a later stage reads
        readers = [layer for layer, stage in self._stage_at.items() if _reads(stage, "previous")]
        self._watched_for = {scores.source_of(self.layers, layer) for layer in readers}
        self._window = guards.sliding_window(self.decoder.config)
        shortened = self.layers[schedule.layers[0] :] if mode.name == "compact" else ()
        self._temperature = guards.temperature_floor(shortened)
        self._call: Call | None = None
        self._inputs: Mapping[str, Any] = {}  # the model's arguments, until the decoder begins
        self._forward: ForwardPass | None = None
        self._watched: tuple[scores.Watched, Length, Tensor | None] | None = None
        self._asking = False
        self._warned = False
        self.running = guards.OneForward()
        self.thread = _PerThread()
        self.enabled = True
        self.trace: list[StageTrace] = []

    def hook(self) -> list[RemovableHandle]:
        """Register all module hooks; return their handles."""
        base = self.model.base_model
        handles = [
            base.register_forward_pre_hook(self._before_model, with_kwargs=True),
            self.decoder.register_forward_hook(self._after_decoder),
            self.layers[-1].register_forward_hook(self._after_last_layer),
            base.register_forward_hook(self.end_pass, always_call=True),
        ]
        if self.decoder is base:  # it makes the embeddings itself
            handles.append(self.layers[0].register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        else:
            handles.append(self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        for index in range(min({self.schedule.layers[0]} | self._watched_for), len(self.layers)):
            layer = self.layers[index]
            handles.append(layer.register_forward_pre_hook(_LayerHook(self, index), with_kwargs=True))
            if index in self._watched_for:
                handles.append(layer.register_forward_hook(self._after_watched, always_call=True))
        return handles

    # -- around the model ------------------------------------------------------------------------------------------

    def calling(self, forward: Callable) -> Callable:
        """Wrap the model's ``forward``: take the pruner's arguments out of the call, and note the labels."""

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            told = self.thread.told = self.thread.calling = Told.pop_from(kwargs)
            try:
                output = forward(*args, **kwargs)
            finally:
                self.thread.told = self.thread.calling = None
            if self.enabled and not told.reached and self._ids.brought(kwargs):
                raise RuntimeError(
                    f"{type(self.model).__name__} got images, but no forward pass of {type(self.decoder).__name__} was "
                    "seen, so that nothing was pruned: this model cannot be supported"
                )
            return output

        return call

    def generating(self, generate: Callable) -> Callable:
        """Wrap the model's ``generate``: its first pass is the prompt, the others are not."""

        @functools.wraps(generate)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.thread.generation is not None:  # a model that drafts for itself
                return generate(*args, **kwargs)
            self.thread.generation = Generation.of(args, kwargs, self.model.generation_config)
            try:
                return generate(*args, **kwargs)
            finally:
                self.thread.generation = None

        return call

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Change | None:
        told, self.thread.told = self.thread.told, None
        takes = told is None and ("prompt_length" in kwargs or "visual_mask" in kwargs)
        told = Told.pop_from(kwargs) if told is None else told
        if not torch.compiler.is_compiling():
            self.thread.survivors = None
        self.running.enter()
        self._call = self._forward = None
        if self.enabled:
            if told.prompt_length is None:
                told.prompt_length = self.thread.prompt_length
            generation, cache = self.thread.generation, kwargs.get("past_key_values")
            tokens = tokens_of(args, kwargs)
            fixed = self.thread.fixed
            if fixed is not None and fixed.knows(tokens):
                self._call, self._inputs = fixed.call, kwargs
                return (args, kwargs) if takes else None
            if generation is not None and tokens is not None:
                generation.tell(told, tokens, cache)
            call = read_call(self._ids, tokens, kwargs, told, self.model.get_input_embeddings, self.decoder)
            if call is not None and generation is not None and generation.length is not None:
                if generation.past is None:  # full ids are usual; of a filled cache the new ones alone are enough
                    generation.past = call.past if call.past and call.shape[1] >= generation.length else 0
                call.generates = generation.length + generation.past
                call.uncached = cache is None
            self._warn_unpruned(call, args, kwargs)
            self._call, self._inputs = call, kwargs if call is not None else {}
        return (args, kwargs) if takes else None

    def _warn_unpruned(self, call: Call | None, args: tuple, kwargs: Mapping[str, Any]) -> None:
        if call is None or call.visual is not None or call.past or self._warned or args:
            return
        if kwargs.get("input_ids") is None:
            self._warned = True
            warnings.warn(
                "inputs_embeds came without pixel_values, mm_encoder_outputs, mm_token_type_ids or visual_mask, so "
                "nothing is pruned; if they hold image features, pass visual_mask= (bool, [batch, tokens])",
                stacklevel=2,
            )

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Change | None:
        if not self.enabled:
            return None
        self.running.check()
        call, self._call = self._call, None
        if self.thread.calling is not None:
            self.thread.calling.reached = True
        inputs, self._inputs = self._inputs, {}
        embeddings: Tensor = (
            args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "inputs_embeds"]
        )
        if self._window is not None or self._temperature is not None:
            self._check_length(call, kwargs, embeddings.shape[1])
        fixed = self.thread.fixed
        if fixed is not None and fixed.forward is not None and call is fixed.call:
            self._forward = fixed.begin(embeddings, inputs)
        else:
            self._forward = begin(call, embeddings, inputs, self._ids if self.schedule.share == "image" else None)
            if self._forward.prunes and self._forward.columns is not None:
                counts = [self.schedule.counts(number) for number in self._forward.num_visual]
                self._forward.upload(list(zip(*counts, strict=True)), embeddings.device)
            if fixed is not None and call is not None and self._forward.prunes:
                fixed.keep(call, self._forward)
        if not self._forward.prunes:
            return None
        guards.refuse_checkpointing(self.layers, self.mode.name)
        kwargs, self._forward.deepstack = take_deepstack(kwargs, self.schedule.layers[0])
        if "logits_to_keep" in self._decoder_takes:  # it would cut the sequence before layers that share keys
            kwargs = {**kwargs, "logits_to_keep": None}
        return args, kwargs

    def _check_length(self, call: Call | None, kwargs: dict[str, Any], new: int) -> None:
        cache = cache_of(kwargs)
        prunes = call is not None and call.visual is not None
        if prunes or self.mode.name == "mask" or hasattr(cache, "_toprl_state"):
            past = cache.get_seq_length() if cache is not None else 0
            length = int(past) + new
            if self._window is not None:
                guards.refuse_window(self._window, length, self.decoder.config, cache, self.mode.name)
            if self._temperature is not None:
                guards.refuse_temperature(self._temperature, length)

    # -- a layer ---------------------------------------------------------------------------------------------------

    def before_layer(self, index: int, number: int, args: tuple, kwargs: dict[str, Any]) -> Change | None:
        """Run the stage before layer ``index``, if there is one, and give the layer the arguments of its segment.

        ``number`` counts the stages at or before this layer: it is the number of the layer's segment.
        """
        forward = self._forward
        if self._asking or (forward is None and not self.enabled):
            return None
        if forward is None:
            raise RuntimeError(
                "the layer ran outside of the model's forward pass, where the pruner knows nothing of the prompt: "
                "detach() first; for gradient checkpointing use the model's own, model.gradient_checkpointing_enable()"
            )
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if not forward.prunes:
            if number not in forward.segments:
                forward.segments[number] = Segment(valid=forward.segments[0].valid)
            forward.current = number
        else:
            hidden_states = self._deepstacked(forward, index, hidden_states)
            if index in self._stage_at:
                hidden_states = self._at_stage(forward, index, hidden_states, kwargs)
        changed = self.mode.before_layer(forward, number, index, hidden_states, kwargs) if number else kwargs
        if forward.prunes and index in self._watched_for:
            past = _length_of(cache_of(changed), index)
            watched = scores.Watched(scores.attention_of(self.layers[index]))
            self._watched = watched, past, _keep_mask_of(changed)
        if args:
            return (hidden_states,), changed
        return args, {**changed, "hidden_states": hidden_states}

    def _deepstacked(self, forward: ForwardPass, index: int, hidden_states: Tensor) -> Tensor:
        """Add the features of the vision tower that the decoder would have added before layer ``index``."""
        if forward.deepstack is None:
            return hidden_states
        return forward.deepstack.add(index, hidden_states, forward.segment.slots)

    def _after_last_layer(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output if self._forward is None else self._deepstacked(self._forward, len(self.layers), output)

    def _after_watched(self, module: nn.Module, args: tuple, output: object) -> None:
        if self._watched is not None and not self._asking:
            self._watched[0].end()

    def _at_stage(self, forward: ForwardPass, index: int, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        stage = self._stage_at[index]
        if hidden_states.ndim != 3:
            raise ValueError(
                f"layers of {type(self.decoder).__name__} hand on states of shape {tuple(hidden_states.shape)}, not "
                "[batch, tokens, width]: this decoder is not supported"
            )
        if not any(forward.num_visual):  # images, but all their tokens are padding: a stage that drops nothing
            forward.current = stage.number + 1
            forward.segments[forward.current] = Segment(valid=forward.segments[0].valid)
            return hidden_states
        forward.move(hidden_states.device)
        if _reads(stage, "current"):
            stage.observe = functools.cache(lambda: self._ask(forward, index, hidden_states, kwargs))
        elif _reads(stage, "previous"):
            stage.observe = self._observed
        generation = self.thread.generation
        known = generation.recall(stage.number, forward) if generation is not None and forward.uncached else None
        with self.running.deciding():
            decision, counts = known or stage.decide(forward, hidden_states)
        stage.observe = self._watched = None
        if generation is not None and forward.uncached and known is None:
            generation.num_visual = forward.num_visual
            generation.decisions[stage.number] = decision, counts
        if decision.deepstack and not drops_nothing(forward.visual, counts):
            if forward.deepstack is None:
                raise ValueError(f"policy {type(stage.policy).__name__}: deepstack, but this model adds no planes")
            forward.deepstack = forward.deepstack.replaced(decision.deepstack, forward.visual, forward.segment)
        forward.bounded_mask_grad = stage.policy.bounded_mask_grad
        return self.mode.at_stage(forward, stage, hidden_states, decision, counts, kwargs)

    def _observed(self) -> Observed:
        """Return the attention call of the layer before the stage."""
        if self._watched is not None:
            watched, past, keep_mask = self._watched
            if watched.seen is not None:
                return Observed(watched.seen, past, keep_mask)
        raise RuntimeError("the attention layer before the stage did not call its attention function")

    def _ask(self, forward: ForwardPass, index: int, hidden_states: Tensor, kwargs: dict[str, Any]) -> Observed:
        """Ask the layer after the stage for its attention over the states that are about to enter."""
        number = self._stage_at[index].number + 1
        changed = self.mode.before_layer(forward, number, index, hidden_states, kwargs)
        past = _length_of(cache_of(changed), index)
        self._asking = True
        try:
            call = scores.ask(self.layers[index], hidden_states, changed)
        finally:
            self._asking = False
        return Observed(call, past, _keep_mask_of(changed))

    # -- the end ---------------------------------------------------------------------------------------------------

    def _after_decoder(self, module: nn.Module, args: tuple, output: BaseModelOutputWithPast) -> None:
        forward = self._forward
        if forward is None:
            return
        survivors = self.mode.finish(forward, output)
        if forward.prunes:
            self.trace = forward.trace
            self._remember(survivors)
        elif forward.length and not forward.past:
            self.trace = []  # a prompt without images
            self._remember(None)

    @torch.compiler.disable
    def _remember(self, survivors: Survivors | None) -> None:
        """Keep the survivors for the loss; a compiled graph does not carry what is local to a thread."""
        self.thread.survivors = survivors

    def end_pass(self, *_: object) -> None:
        """Forget the forward pass, unless it is another thread's."""
        if self.running.leave():
            self.forget()

    def forget(self) -> None:
        """Forget the forward pass."""
        if self._watched is not None:
            self._watched[0].end()
        self._forward = self._call = self._watched = None
        self._inputs = {}

    @torch.compiler.disable
    def _recall(self) -> Survivors | None:
        return self.thread.survivors

    def loss(
        self, model_loss: Callable[..., Tensor], logits: Tensor, labels: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Compute the model's own loss, where labels that concern dropped tokens are ignored."""
        survivors = self._recall()
        if survivors is not None:
            dropped = survivors.dropped()
            labels = without_dropped(dropped, labels)
            if "shift_labels" in kwargs:
                kwargs["shift_labels"] = without_dropped(dropped, kwargs["shift_labels"], shifted=True)
        return model_loss(logits, labels, *args, **kwargs)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse a copy of the model: it would have the pruner's state without being attached."""
        raise RuntimeError(
            "a model cannot be copied or pickled while a Pruner is attached: detach() first and attach to the copy, or "
            "save model.state_dict() or model.save_pretrained(folder)"
        )


def _reads(stage: Stage, source: str) -> bool:
    return stage.attention_from == source


def _length_of(cache: Cache | None, index: int) -> Length:
    """Count the cached keys of layer ``index``; a static cache goes on counting in the tensor that it returns."""
    length = cache.get_seq_length(index) if cache is not None else 0
    return length.clone() if isinstance(length, Tensor) else length


def _keep_mask_of(kwargs: Mapping[str, Any]) -> Tensor | None:
    argument = kwargs.get("toprl_keep")
    return None if argument is None or argument.keep_mask is None else argument.keep_mask.detach()


class _LayerHook:
    """Pre-hook of a decoder layer; a class, because the layer's number must come along."""

    def __init__(self, runtime: Runtime, index: int) -> None:
        self.runtime, self.index = runtime, index
        self.number = sum(layer <= index for layer in runtime.schedule.layers)  # stages at or before this layer
        # of the arguments after hidden_states
        self.names = [*inspect.signature(type(runtime.layers[index]).forward).parameters][2:]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Change | None:
        if len(args) > 1:
            args, kwargs = args[:1], dict(zip(self.names, args[1:], strict=False)) | kwargs
        try:
            return self.runtime.before_layer(self.index, self.number, args, kwargs)
        except TypeError as error:
            # transformers answers a TypeError by running the forward again without some arguments
            raise RuntimeError(f"pruning before layer {self.index} failed: {error}") from error
        except KeyboardInterrupt:
            self.runtime.end_pass()  # torch skips the hooks after the model then
            raise
