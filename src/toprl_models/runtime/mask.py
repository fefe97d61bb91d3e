"""Mask mode: Eqs. 6-7 through transformers' AttentionInterface, under the name ``toprl_masked``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toprl_kernels import masked_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "toprl_masked"


def toprl_masked_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    toprl_keep_mask: Tensor | None = None,
    toprl_bounded_mask_grad: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: ``[B, H, Nq, D]`` in, ``([B, Nq, H, D], None)`` out.

    ``attention_mask`` is the 2-D padding mask that ``padding_mask`` below made, ``toprl_keep_mask`` [B, N] comes from
    the pruner's layer hook; without it all tokens are kept. ``toprl_bounded_mask_grad`` is the policy's.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            'output_attentions=True: mask mode computes no attention matrix; use mode="compact" and '
            'model.set_attn_implementation("eager")'
        )
    if dropout:
        raise ValueError(f"dropout={dropout}: mask mode has no attention dropout; put the model in eval mode")
    if attention_mask is not None:  # a static cache has free slots behind the tokens
        key, value = (states[:, :, : attention_mask.shape[1]] for states in (key, value))
    if toprl_keep_mask is None:
        toprl_keep_mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    output = masked_attention(
        query,
        key,
        value,
        toprl_keep_mask,
        key_padding_mask=attention_mask,
        is_causal=True,
        scale=scaling,
        bounded_mask_grad=toprl_bounded_mask_grad,
    )
    return output.transpose(1, 2).contiguous(), None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    mask_function: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask maker of ``toprl_masked``: the 2-D padding mask itself, bool ``[B, N]``; causality is the kernel's.

    N are the tokens seen so far: a static cache is longer than that, a mask must be there to tell.

    Raises:
        ValueError: the model asks for another pattern than the causal one.
    """
    _refuse_other_patterns(mask_function, batch_size, q_length, kv_length, q_offset, device, kwargs)
    length = int(q_offset) + q_length
    if attention_mask is None:
        return None if length == kv_length else torch.ones(batch_size, length, dtype=torch.bool, device=device)
    mask = attention_mask[:, :length].bool()
    if mask.shape[1] < length:
        mask = torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=False)
    return mask


def _refuse_other_patterns(
    mask_function: Callable[..., Any] | None,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    device: torch.device | str,
    kwargs: dict[str, Any],
) -> None:
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if mask_function is None or mask_function is causal_mask_function:
        return
    options = kwargs | {"device": device, "allow_is_causal_skip": False}
    asked, causal = (
        sdpa_mask(batch_size, q_length, kv_length, q_offset, mask_function=function, **options)
        for function in (mask_function, causal_mask_function)
    )
    assert asked is not None and causal is not None
    if not bool((asked == causal).all()):  # a window that is longer than the sequence is no other pattern
        raise ValueError(
            'mode="mask" knows causal attention alone, but this model asks for another pattern (image tokens that see '
            'each other, a sliding window, or packed sequences); use mode="compact"'
        )


def install(model: PreTrainedModel) -> str:
    """Switch the decoder of ``model`` to masked attention; returns the implementation it had."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, toprl_masked_forward)
    AttentionMaskInterface.register(NAME, padding_mask)
    previous = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation({"text_config": NAME})
    return previous


def restore(model: PreTrainedModel, implementation: str) -> None:
    """Undo ``install``."""
    model.set_attn_implementation({"text_config": implementation})
