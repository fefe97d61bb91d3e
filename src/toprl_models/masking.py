"""Mask mode: Eqs. 6-7 through transformers' AttentionInterface, under the name ``toprl_masked``."""

from __future__ import annotations

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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: ``[B, H, Nq, D]`` in, ``([B, Nq, H, D], None)`` out.

    ``attention_mask`` is the 2-D padding mask that ``padding_mask`` below made, ``toprl_keep_mask`` [B, N] comes from
    the pruner's layer hook; without it all tokens are kept.
    """
    if dropout:
        raise ValueError(f"dropout={dropout}: mask mode has no attention dropout; put the model in eval mode")
    if toprl_keep_mask is None:
        toprl_keep_mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    output = masked_attention(
        query, key, value, toprl_keep_mask, key_padding_mask=attention_mask, is_causal=True, scale=scaling
    )
    return output.transpose(1, 2).contiguous(), None


def padding_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """The mask maker of ``toprl_masked``: the 2-D padding mask itself, bool ``[B, N]``; causality is the kernel's."""
    if attention_mask is None:
        return None
    mask = attention_mask[:, :kv_length].bool()
    if mask.shape[1] < kv_length:
        mask = torch.nn.functional.pad(mask, (0, kv_length - mask.shape[1]), value=False)
    return mask


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
