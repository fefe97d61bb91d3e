"""Addresses beyond 2^31 elements. No poisoned memory here: the gigabytes between the rows are never touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.test_attention_triton import COMPACT, make, run
from toprl_kernels import configs


def spread(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy of ``tensor`` with the given strides."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
    storage = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
    return storage.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize("pinned", [{}, COMPACT], ids=["list", "gathered"])
@pytest.mark.parametrize("strides", [(2**31, 512, 32, 1), (512, 2**31, 32, 1), (64, 32, 2**29, 1)])
def test_masked_attention(strides: tuple[int, ...], pinned: dict[str, configs.LaunchConfig], device: str) -> None:
    """Samples, heads or rows far apart, forward and backward: bitwise as with dense tensors."""
    case = make(2, 2, 2, 5, 6, 16, dtype=torch.float16, device=device)
    query, key, value = (spread(tensor, strides) for tensor in case[:3])
    far = case._replace(query=query, key=key, value=value)
    with configs.override(pinned | {"masked_attention_decode": configs.LaunchConfig(16, 16, 4, 1)}):
        for left, right in zip(run(far), run(case), strict=True):
            assert torch.equal(left, right)
