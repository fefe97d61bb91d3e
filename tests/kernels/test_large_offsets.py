"""Addresses beyond 2^31 elements. No poisoned memory here: the gigabytes between the rows are never touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from toprl_kernels import masked_attention
from toprl_kernels.testing import make_attention_inputs


def spread(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy of ``tensor`` with the given strides."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
    storage = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
    return storage.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize("strides", [(2**31, 512, 32, 1), (512, 2**31, 32, 1), (64, 32, 2**29, 1)])
def test_masked_attention(strides: tuple[int, ...], device: str) -> None:
    """Samples, heads or rows far apart, forward and backward: bitwise as with dense tensors."""
    x = make_attention_inputs(2, 2, 2, 5, 6, 16, dtype=torch.float16, mask="mixed", device=device)
    far = [spread(tensor, strides) for tensor in x[:3]]
    keep_mask = x.keep_mask.clone().requires_grad_()

    def results(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = masked_attention(*leaves, keep_mask, is_causal=True, backend="triton")
        return (output, *torch.autograd.grad(output, [*leaves, keep_mask], x.grad_output))

    for left, right in zip(results(far), results(list(x[:3])), strict=True):
        assert torch.equal(left, right)
