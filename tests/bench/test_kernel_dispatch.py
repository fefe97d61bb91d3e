"""The table of what a call costs before its kernel."""

from __future__ import annotations

from unittest import mock

from bench import kernel_dispatch
from toprl_kernels import masked_attention
from toprl_kernels.backend import OPS
from toprl_kernels.testing import make_attention_inputs


def test_every_op_has_a_row_and_its_implementation_back() -> None:
    with mock.patch.multiple(kernel_dispatch, ROUNDS=2, CALLS=3):
        rows = kernel_dispatch.dispatch_table()
    assert [row["op"] for row in rows] == list(OPS)
    assert all(
        isinstance(row[column], float) for row in rows for column in ("no_grad_us", "grad_us", "bar_us", "function_us")
    )
    x = make_attention_inputs(1, 2, 2, 5, 5, 4, mask="hard")  # not the finished tensors of the table
    assert masked_attention(x.query, x.key, x.value, x.keep_mask).shape == (1, 2, 5, 4)
