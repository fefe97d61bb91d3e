"""What the pruner refuses, because the numbers would be wrong without anyone noticing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from toprl_models.runtime.compat import repeats_hooks


class OneForward:
    """Lets one forward pass of one thread through at a time: the hooks of a Pruner share its state.

    A pass that KeyboardInterrupt ended outside of the pruner's hooks, which torch then skips, still counts as under way
    for other threads; the next pass of its own thread takes its place.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._decides = False  # a policy is being asked

    def enter(self) -> None:
        """A forward pass begins.

        Raises:
            RuntimeError: another one is under way, in another thread or around this one.
        """
        if torch.compiler.is_compiling():  # a compiled graph holds this state in local variables
            return
        with self._lock:
            self._check()
            self._thread = threading.get_ident()

    def check(self) -> None:
        """As ``enter``, for a part of the model that may be called on its own."""
        if not torch.compiler.is_compiling() and self._thread != threading.get_ident():
            with self._lock:
                self._check()

    def _check(self) -> None:
        mine = self._thread == threading.get_ident()
        if self._thread is not None and (self._decides or not mine):
            raise RuntimeError(
                "this Pruner is in the middle of a forward pass "
                + ("(its policy called the model)" if mine else "in another thread")
                + "; put a lock around generate() and forward(), or give each thread its own model and Pruner"
            )

    @contextlib.contextmanager
    def deciding(self) -> Iterator[None]:
        """While a policy is asked: a forward pass of the same thread would be its doing."""
        self._decides = True
        try:
            yield
        finally:
            self._decides = False

    def leave(self) -> bool:
        """The pass ended; False for one that was refused: the state belongs to the other."""
        if torch.compiler.is_compiling():
            return True
        with self._lock:
            if self._thread != threading.get_ident() or self._decides:
                return False
            self._thread = None
            return True


def refuse_checkpointing(layers: nn.ModuleList, mode: str) -> None:
    """Refuse gradient checkpointing that would compute other gradients than the same model without it."""
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


def sliding_window(config: Any) -> int | None:
    """Return the shortest window or chunk of attention of a text config; None when all layers see everything."""
    kinds = getattr(config, "layer_types", None)
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    windows = [
        window if kinds is None or "sliding_attention" in kinds else None,
        chunk if kinds is None or "chunked_attention" in kinds else None,
    ]
    return min((size for size in windows if size is not None), default=None)


def refuse_window(window: int, length: int) -> None:
    """Refuse a sequence that is longer than the window: slots of a pruned sequence are no distances."""
    if length > window:
        raise RuntimeError(
            f"sliding_window={window} (or attention_chunk_size) is shorter than the sequence of {length} tokens, which "
            "pruning does not support: shorten the prompt or the answer, or load the model with "
            "config.get_text_config().sliding_window = None if it was trained for that"
        )
