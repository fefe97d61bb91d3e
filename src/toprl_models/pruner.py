"""attach(): prune visual tokens inside the decoder of a transformers model, by hooks alone.

``compact`` mode removes tokens: before a stage's layer the survivors are gathered, later layers run on the short
sequence and write short key/value caches. ``mask`` mode removes nothing: attention follows Eqs. 6-7 of the paper. Both
give the same numbers on surviving tokens, and no class is patched.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NoReturn, SupportsIndex

from torch import Tensor, nn

from toprl_models.families import family_of, min_stage_of
from toprl_models.policy import Policy
from toprl_models.probe import blocked_stages, decoder_of, has_plain_positions
from toprl_models.runtime.compact import Compact
from toprl_models.runtime.guards import refuse_key_selection, refuse_recurrent
from toprl_models.runtime.hooks import Runtime
from toprl_models.runtime.mask import Mask
from toprl_models.runtime.prompt import FixedPrompt, VisualIds
from toprl_models.runtime.scores import attention_of, source_of
from toprl_models.runtime.state import StageTrace
from toprl_models.schedule import Schedule

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

Mode = Literal["compact", "mask"]
# Decoders that are hooked now, so that a second attach is refused.
_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Pruner:
    """Prunes the visual tokens of one model until detached; made by ``attach``."""

    def __init__(self, model: PreTrainedModel, policy: Policy, schedule: Schedule, mode: Mode) -> None:
        self.model, self.policy, self.schedule, self.mode = model, policy, schedule, mode
        decoder = decoder_of(model)
        plain = has_plain_positions(model)
        renumbers = tuple(
            plain and policy.at_stage(stage).positions == "renumbered" for stage in range(len(schedule.layers))
        )
        self._mode: Compact | Mask = Mask() if mode == "mask" else Compact(decoder, schedule.layers, renumbers)
        self._runtime = Runtime(model, policy, schedule, self._mode, VisualIds.of(model, family_of(model)))
        runtime = self._runtime
        self._handles: list[RemovableHandle] = runtime.hook()
        try:
            self._handles += self.policy.hooks(model)
        except BaseException:  # the model is as it was
            for handle in self._handles:
                handle.remove()
            raise
        _ATTACHED.add(decoder)
        self._wrapped: dict[str, tuple[object, object]] = {}  # the model's attributes: ours, and the instance's before
        # PEFT calls the method forward(), past the module's hooks
        self._wrap("forward", runtime.calling(model.forward))
        self._wrap("generate", runtime.generating(model.generate))
        for name in ("generate_batch", "init_continuous_batching"):
            if hasattr(model, name):
                self._wrap(name, _refuse_continuous_batching)
        # transformers' own place for another loss: model.forward() asks the instance before the class
        self._wrap("_loss_function", functools.partial(runtime.loss, model.loss_function))
        self._mode.install(model)

    def _wrap(self, name: str, value: Callable) -> None:
        self._wrapped[name] = value, vars(self.model).get(name)
        setattr(self.model, name, value)

    def detach(self) -> None:
        """Remove every hook and restore the model's attributes and attention; safe to call twice.

        Raises:
            RuntimeError: another thread is in the middle of a forward pass.
        """
        self._runtime.running.check()
        for handle in self._handles:
            handle.remove()
        for name, (value, before) in self._wrapped.items():
            if vars(self.model).get(name) is value:
                delattr(self.model, name)
                if before is not None:
                    setattr(self.model, name, before)
        self._handles, self._wrapped = [], {}
        self._runtime.enabled = False  # a wrapper that others have wrapped stays, and does nothing
        self._mode.uninstall(self.model)
        _ATTACHED.discard(decoder_of(self.model))
        self._runtime.forget()
        self._runtime.thread.survivors = None

    @property
    def attached(self) -> bool:
        """Tell whether this object prunes the model now."""
        return bool(self._handles)

    @property
    def trace(self) -> list[StageTrace]:
        """List what each stage did in the last prompt with images; empty after a prompt without any."""
        return self._runtime.trace

    @trace.setter
    def trace(self, trace: list[StageTrace]) -> None:
        self._runtime.trace = trace

    def __enter__(self) -> Pruner:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Leave the model unpruned within this context; caches of pruned prompts do not mix in."""
        self._runtime.running.check()
        was, self._runtime.enabled = self._runtime.enabled, False
        self._mode.uninstall(self.model)
        try:
            yield
        finally:
            self._runtime.enabled = was
            if self.attached:
                self._mode.install(self.model)

    @contextlib.contextmanager
    def prompt_length(self, length: int | Tensor) -> Iterator[None]:
        """End the prompts of forward passes within this context after ``length`` slots; a policy sees nothing later.

        ``model(..., prompt_length=length)`` says the same of one call. Without it, the first label that is not -100
        begins the answer, or the prompt is that of ``generate()``, or all of the forward pass.

        Args:
            length: slots from the start of the sequence, padding and cached tokens included (from the start of each
                prompt where several are packed into a row): an int, or int64 ``[batch]``.
        """
        thread = self._runtime.thread
        was, thread.prompt_length = thread.prompt_length, length
        try:
            yield
        finally:
            thread.prompt_length = was

    @contextlib.contextmanager
    def fixed_prompt(self) -> Iterator[None]:
        """Take the layout of the first prompt within this context for all prompts of its shape that follow.

        Its layout is where images, padding and question are. Later passes read no ids and wait for nothing, and where
        the policy keeps fixed counts neither do the stages, so that a prefill of fixed length and schedule can be
        captured as a CUDA graph: run the model once as warm-up, capture the second pass, replay it on other pixels and
        words of the same layout.
        """
        thread = self._runtime.thread
        was, thread.fixed = thread.fixed, FixedPrompt()
        try:
            yield
        finally:
            thread.fixed = was

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        self._runtime.__reduce_ex__(protocol)  # refuses, as do copies of the model


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    """Refuse transformers' continuous batching, which has pages of keys and values instead of a cache."""
    raise ValueError(
        "continuous batching (generate_batch) would run unpruned: use generate(), or detach() the Pruner first"
    )


def attach(model: PreTrainedModel, policy: Policy, *, schedule: Schedule, mode: Mode = "compact") -> Pruner:
    """Prune the visual tokens of ``model`` with ``policy`` at the stages of ``schedule``.

    Args:
        model: a supported transformers model (see ``toprl_models.families``).
        policy: scores visual tokens: a ``TopRLPolicy`` or another method.
        schedule: which layers keep how many tokens.
        mode: "compact" removes tokens and their keys and values; "mask" keeps all and masks attention (Eqs. 6-7).

    Returns:
        The ``Pruner``; a context manager that detaches on leaving. A prompt without visual tokens is not pruned.

    A stage decides on the visual tokens of one forward pass. Images of a later turn on the same cache, or of a later
    chunk (``prefill_chunk_size``, which may cut no image), are pruned by themselves, by the same schedule.

    Raises:
        TypeError: unsupported model class; ``policy`` is not a Policy, ``schedule`` not a Schedule.
        ValueError: unknown mode, a stage outside the decoder, or a policy that does not fit the model, the schedule or
            the mode.
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
    schedule.check_layers(len(decoder.layers))
    first = min_stage_of(model, family)
    if schedule.layers[0] < first:
        raise ValueError(
            f"schedule: first stage at layer {schedule.layers[0]}, but {type(model).__name__} can prune before layer "
            f"{first} at the earliest"
        )
    blocked = blocked_stages(decoder)
    for layer in schedule.layers:
        if layer in blocked:
            raise ValueError(
                f"schedule: a stage at layer {layer}, but from there on {type(decoder).__name__} uses the keys and "
                f"values, or the selected keys, of layer {blocked[layer]} again, and must see the same tokens: choose "
                "one of "
                f"{sorted(set(range(len(decoder.layers))) - set(blocked))}"
            )
    refuse_recurrent(decoder.layers, schedule.layers[0], mode)
    if mode == "mask":
        refuse_key_selection(decoder.layers, schedule.layers[0])
    policy.check(model, schedule)
    for stage, layer in enumerate(schedule.layers):
        _check_stage(policy.at_stage(stage), layer, schedule.layers[stage - 1] if stage else 0, decoder, mode)
    return Pruner(model, policy, schedule, mode)


def _check_stage(policy: Policy, layer: int, earlier: int, decoder: PreTrainedModel, mode: Mode) -> None:
    """Refuse a policy that does not fit the decoder or the mode at the stage before ``layer``, ``earlier`` the last."""
    name = type(policy).__name__
    if policy.attention_from not in ("none", "previous", "current"):
        raise ValueError(f'policy.attention_from={policy.attention_from!r} must be "none", "previous" or "current"')
    if policy.attention_from == "previous" and not layer:
        raise ValueError(f"schedule: a stage at layer 0, but {name} reads the attention of the layer before")
    if policy.attention_from == "current":
        attention_of(decoder.layers[layer])
    elif policy.attention_from == "previous":
        source = source_of(decoder.layers, layer)
        attention_of(decoder.layers[source])
        if source < earlier:
            raise ValueError(
                f"schedule: {name} at layer {layer} reads the attention of layer {source}, the last before it that has "
                f"attention, but the stage before layer {earlier} lies between: choose another layer"
            )
    if policy.positions not in ("original", "renumbered"):
        raise ValueError(f'policy.positions={policy.positions!r} must be "original" or "renumbered"')
    if policy.positions == "renumbered" and mode == "mask":
        raise ValueError(
            f'mode="mask" removes nothing, so that positions stay, but {name} has positions="renumbered": use '
            'mode="compact", or set policy.positions = "original"'
        )
