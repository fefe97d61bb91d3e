"""What the pruner refuses, because the numbers would be wrong without anyone noticing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from toprl_models.probe import branches_on_backend, has_attention, has_state
from toprl_models.runtime.compat import repeats_hooks

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig


class OneForward:
    """Lock that admits one forward pass of one thread at a time: the hooks of a Pruner share state.

    After a KeyboardInterrupt outside of the pruner's hooks, which torch then skips, the pass still counts as under way
    for other threads; the next pass of the same thread takes its place.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._decides = False  # a policy is being asked

    def enter(self) -> None:
        """Begin a forward pass; refuse it while another thread's, or a pass around it, is under way."""
        if torch.compiler.is_compiling():  # a compiled graph holds this state in local variables
            return
        with self._lock:
            self._check()
            self._thread = threading.get_ident()

    def check(self) -> None:
        """Refuse what ``enter`` refuses, for a part of the model that may be called by itself."""
        if not torch.compiler.is_compiling() and self._thread != threading.get_ident():
            with self._lock:
                self._check()

    def _check(self) -> None:
        same_thread = self._thread == threading.get_ident()
        if self._thread is not None and (self._decides or not same_thread):
            raise RuntimeError(
                "this Pruner is in the middle of a forward pass "
                + ("(its policy called the model)" if same_thread else "in another thread")
                + "; put a lock around generate() and forward(), or give each thread its own model and Pruner"
            )

    @contextlib.contextmanager
    def deciding(self) -> Iterator[None]:
        """Mark the time in which a policy is asked: a pass of the same thread is then the policy's."""
        self._decides = True
        try:
            yield
        finally:
            self._decides = False

    def leave(self) -> bool:
        """End the pass; return False for a refused pass, as the state belongs to the other."""
        if torch.compiler.is_compiling():
            return True
        with self._lock:
            if self._thread != threading.get_ident() or self._decides:
                return False
            self._thread = None
            return True


def refuse_checkpointing(layers: nn.ModuleList, mode: str) -> None:
    """Refuse gradient checkpointing that would change the gradients."""
    for layer in layers:
        if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
            continue
        keywords = getattr(layer._gradient_checkpointing_func, "keywords", {})
        if mode == "mask" and keywords.get("use_reentrant") is not False:
            raise RuntimeError(
                'reentrant gradient checkpointing is not supported in mode="mask": it drops the gradient of the keep '
                'mask, a keyword argument of the layer; call model.gradient_checkpointing_enable({"use_reentrant": '
                "False})"
            )
        if repeats_hooks(type(layer)):
            raise RuntimeError(
                "gradient checkpointing of this transformers release runs the layers' hooks a second time, after the "
                "pruner's pass has ended; detach, switch checkpointing off, or use transformers>=5.23"
            )


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Return the shortest attention window or chunk of a text config; None where all layers see everything."""
    kinds = getattr(config, "layer_types", None)
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    windows = [
        window if kinds is None or "sliding_attention" in kinds else None,
        chunk if kinds is None or "chunked_attention" in kinds else None,
    ]
    return min((size for size in windows if size is not None), default=None)


def temperature_floor(layers: Iterable[nn.Module]) -> int | None:
    """Return the length from which attention temperatures depend on slots (Llama 4); None: never."""
    modules = [module for layer in layers for module in layer.modules()]
    scaled = [module for module in modules if getattr(module, "attn_temperature_tuning", False)]
    return min((int(module.floor_scale) for module in scaled if not module.use_rope), default=None)  # type: ignore[arg-type]


def refuse_temperature(floor: int, length: int) -> None:
    """Refuse a sequence whose layers scale queries by slot: slots of a shortened one are no positions."""
    if length >= floor:
        raise RuntimeError(
            f"floor_scale={floor}: from that length on layers without rotary embedding scale their queries by slot "
            f'(attn_temperature_tuning), which mode="compact" does not support (the sequence has {length} tokens): '
            'shorten the prompt or the answer, or use mode="mask"'
        )


def refuse_padding_after_state(layer: nn.Module, index: int) -> None:
    """Refuse padding between two turns: it would enter a convolution or a recurrence."""
    raise ValueError(
        f"{type(layer).__name__} (decoder layer {index}) keeps a state of earlier turns, and the rows of this turn "
        "differ in length once they are pruned: padding would enter the state; run the rows one by one, or all turns "
        "in a single pass"
    )


def refuse_packing_with_state(layers: nn.ModuleList) -> None:
    """Refuse several prompts in a row where a convolution or a recurrence runs on from one into the next."""
    for index, layer in enumerate(layers):
        if has_state(layer):
            raise ValueError(
                f"{type(layer).__name__} (decoder layer {index}) keeps a state of all earlier tokens, which runs on "
                "from one prompt of a row into the next: give each prompt a row of its own"
            )


def refuse_recurrent(layers: nn.ModuleList, first: int, mode: str) -> None:
    """Refuse a decoder whose layers from ``first`` on cannot forget a token."""
    for index, layer in list(enumerate(layers))[first:]:
        both = has_attention(layer)
        if has_state(layer) and (both or mode == "mask"):
            better = "" if both else ', use mode="compact"'
            raise ValueError(
                f"{type(layer).__name__} (decoder layer {index}) keeps a state of all earlier tokens, from which Eq. 7 "
                f'cannot take a token: mode="{mode}" cannot support this decoder{better}'
            )


def refuse_key_selection(layers: nn.ModuleList, first: int) -> None:
    """Refuse mask mode where layers from ``first`` on select keys themselves, for backends that they know by name."""
    for index, layer in list(enumerate(layers))[first:]:
        if any(branches_on_backend(module) for module in layer.modules()):
            raise ValueError(
                f"{type(layer).__name__} (decoder layer {index}) selects keys before attention, which Eq. 7 has not: "
                'mode="mask" cannot support this decoder, use mode="compact"'
            )


def refuse_window(window: int, length: int, config: PreTrainedConfig, cache: Cache | None, mode: str) -> None:
    """Refuse a sequence longer than the window where slots of a pruned sequence are taken for distances."""
    fix = None
    if mode == "compact" and "flash" in config._attn_implementation:
        fix = 'flash attention counts the slots of a pruned sequence: use attn_implementation="sdpa"'
    elif getattr(cache, "is_compileable", False):
        fix = "a StaticCache lets tokens go by slot: use a DynamicCache, the default"
    if length > window and fix is not None:
        raise RuntimeError(
            f"sliding_window={window} is shorter than the sequence of {length} tokens (attention_chunk_size counts as "
            f"one), and {fix}"
        )
