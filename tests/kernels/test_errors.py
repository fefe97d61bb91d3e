"""Bad arguments of every op: each message names the argument, the value seen and the way out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from toprl_kernels import (
    actor_score,
    compact_cache,
    keep_mask_log_prob,
    masked_attention,
    prune_stage,
    sample_keep_mask,
    topk_compact,
)
from toprl_kernels.testing import make_actor_weights, make_attention_inputs

NAN, INF = math.nan, math.inf
COLUMNS = torch.tensor([[-1, 0, 1, -1]])
GOOD: dict[Callable[..., Any], dict[str, Any]] = {
    masked_attention: make_attention_inputs(2, 4, 2, 5, 7, 8)._asdict(),
    topk_compact: dict(hidden_states=torch.zeros(2, 4, 3), scores=torch.zeros(2, 4), k=2),
    actor_score: dict(hidden_states=torch.zeros(1, 4, 16), stage=0, weights=make_actor_weights(16, 8)),
    compact_cache: dict(keys=torch.zeros(1, 2, 4, 3), values=torch.zeros(1, 2, 4, 5), indices=torch.tensor([[0, 2]])),
    prune_stage: dict(hidden_states=torch.zeros(1, 4, 3), scores=torch.zeros(1, 2), columns=COLUMNS, k=1),
    sample_keep_mask: dict(logits=torch.zeros(2, 5, 2)),
    keep_mask_log_prob: dict(logits=torch.zeros(1, 2, 2)),
}
del GOOD[masked_attention]["grad_output"]
BAD: dict[Callable[..., Any], list[tuple[dict[str, Any], type[Exception], str]]] = {
    masked_attention: [
        ({"query": torch.zeros(4, 5, 8)}, ValueError, r"query must be \[B, H, Nq, D\].*\(4, 5, 8\)"),
        ({"query": torch.zeros(2, 4, 9, 8)}, ValueError, r"Nq=9.*N=7.*Nq <= N"),
        ({"query": torch.zeros(2, 3, 5, 8)}, ValueError, r"H=3.*Hkv=2.*multiple"),
        ({"key": torch.zeros(2, 2, 7, 6)}, ValueError, r"key must be.*\(2, 2, 7, 6\)"),
        ({"value": torch.zeros(2, 2, 6, 8)}, ValueError, r"value must be.*\(2, 2, 6, 8\)"),
        ({"keep_mask": torch.zeros(2, 5)}, ValueError, r"keep_mask must be \[B, N\] = \(2, 7\).*\(2, 5\)"),
        ({"keep_mask": torch.zeros(2, 7, dtype=torch.int64)}, TypeError, r"keep_mask has dtype int64.*bool\(\)"),
        ({"keep_mask": [[1.0]]}, TypeError, r"keep_mask must be a torch.Tensor, got list"),
        ({"key": torch.zeros(2, 2, 7, 8, dtype=torch.float16)}, TypeError, r"key has dtype float16"),
        ({"query": torch.zeros(2, 4, 5, 8, dtype=torch.int64)}, TypeError, r"query has dtype int64"),
        ({"key_padding_mask": torch.ones(2, 7)}, TypeError, r"key_padding_mask has dtype float32.*True = real"),
        ({"key_padding_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"key_padding_mask must be"),
        ({"keep_mask": torch.zeros(2, 7, device="meta")}, ValueError, r"keep_mask is on meta.*cpu"),
        ({"backend": "cuda"}, ValueError, r"backend='cuda'.*auto, eager, triton, reference"),
    ],
    topk_compact: [
        ({"k": 5}, ValueError, r"k=5 is outside 0..N=4.*min\(k"),
        ({"k": -1}, ValueError, r"k=-1 is outside 0..N=4"),
        ({"k": 2.0}, TypeError, r"k must be an int.*2.0 of type float"),
        ({"k": True}, TypeError, r"k must be an int.*True of type bool"),
        ({"k": torch.tensor([1, 2, 3])}, ValueError, r"k must be \[B\].*\(2,\).*\(3,\)"),
        ({"k": torch.tensor([1.0, 2.0])}, TypeError, r"k has dtype float32.*long"),
        ({"hidden_states": torch.zeros(2, 4)}, ValueError, r"hidden_states must be \[B, N, d\]"),
        ({"scores": torch.zeros(2, 3)}, ValueError, r"scores must be \[B, N\] = \(2, 4\).*\(2, 3\)"),
        ({"scores": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, r"scores has dtype int64.*float\(\)"),
        ({"scores": torch.zeros(2, 4, device="meta")}, ValueError, r"scores is on meta"),
        ({"position_ids": torch.zeros(2, 2, 4)}, ValueError, r"position_ids must be.*\[3, B, N\].*\(2, 2, 4\)"),
        ({"position_ids": torch.zeros(2, 4)}, TypeError, r"position_ids has dtype float32.*long"),
        ({"padding_side": "both"}, ValueError, r"padding_side='both' is unknown; use 'right' or 'left'"),
        ({"max_length": 3}, ValueError, r"max_length=3 is for a tensor k, the int k=2 is the length"),
        ({"k": torch.tensor([1, 2]), "max_length": 5}, ValueError, r"max_length=5 is outside 0..N=4"),
        (
            {"k": torch.tensor([1, 3]), "max_length": 2, "validate": True},
            ValueError,
            r"k=\[1, 3\] has values above max_length=2; raise max_length",
        ),
        ({"valid_mask": torch.ones(2, 4)}, TypeError, r"valid_mask has dtype float32.*True = eligible"),
        ({"segments": torch.zeros(2, 4).long()}, ValueError, r"k=2 is one number for all segments"),
        ({"segments": torch.zeros(2, 4), "k": torch.ones(2, 1).long()}, TypeError, r"segments has dtype float32"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, r"hidden_states must be \[N, d\] with cu_seqlens"),
        ({"scores": torch.tensor([[NAN, 0, 0, 0]] * 2), "validate": True}, ValueError, r"scores has 2 NaN"),
        ({"scores": torch.full((2, 4), INF), "validate": True}, ValueError, r"force in \[4, 4\].*k=2"),
    ],
    actor_score: [
        ({"hidden_states": torch.zeros(4, 16)}, ValueError, r"hidden_states must be \[B, N, d1\]"),
        ({"hidden_states": torch.zeros(1, 4, 12)}, ValueError, r"weights.norm_weight must be.*d1=12.*\(16,\)"),
        ({"stage": 3}, ValueError, r"stage=3 is outside 0..2"),
        ({"stage": -1}, ValueError, r"stage=-1 is outside 0..2"),
        ({"stage": 1.0}, TypeError, r"stage must be an int"),
        ({"weights": tuple(make_actor_weights(16, 8))}, TypeError, r"ActorWeights.*got tuple"),
        ({"weights": make_actor_weights(16, 7)}, ValueError, r"d2=7 rows; d2 must be even"),
        ({"weights": make_actor_weights(16, 8)._replace(fc3_bias=torch.zeros(9))}, ValueError, r"weights.fc3_bias"),
        (
            {"weights": make_actor_weights(16, 8)._replace(head_bias=torch.zeros(2).half())},
            TypeError,
            r"weights.head_bias has dtype float16.*share one dtype",
        ),
        ({"valid_mask": torch.ones(1, 5, dtype=torch.bool)}, ValueError, r"valid_mask must be \[B, N\] = \(1, 4\)"),
        ({"valid_mask": torch.ones(1, 4)}, TypeError, r"valid_mask has dtype float32"),
        ({"indices": torch.zeros(1, 2)}, TypeError, r"indices has dtype float32.*long"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, r"hidden_states must be \[N, d1\] with cu_seqlens"),
        ({"weights": make_actor_weights(16, 258), "backend": "triton"}, RuntimeError, r"d2=258.*d2 <= 256"),
    ],
    compact_cache: [
        ({"keys": torch.zeros(2, 4, 3)}, ValueError, r"keys must be \[B, Hkv, N, D\] \(4 dimensions\)"),
        ({"values": torch.zeros(1, 2, 5, 5)}, ValueError, r"values must be \[B, Hkv, N, Dv\] = \(1, 2, 4, 5\)"),
        ({"indices": torch.tensor([0, 2])}, ValueError, r"indices must be \[B, K\]"),
        ({"indices": torch.tensor([[0], [2]])}, ValueError, r"indices must be \[B, K\] = \(1, 1\)"),
        ({"indices": torch.tensor([[0, 2]]).int()}, TypeError, r"indices has dtype int32.*long"),
        ({"indices": torch.tensor([[0, 4]]), "validate": True}, ValueError, r"indices has \[4\] outside -1..N-1=3"),
        ({"indices": torch.tensor([[2, 2]]), "validate": True}, ValueError, r"names a token of a sample twice"),
        ({"keys": torch.zeros(1, 2, 4, 3).cfloat(), "backend": "triton"}, RuntimeError, r"keys or values are complex"),
    ],
    prune_stage: [
        ({"hidden_states": torch.zeros(4, 3)}, ValueError, r"hidden_states must be \[B, N, d\]"),
        ({"scores": torch.zeros(1, 2, 3)}, ValueError, r"scores must be \[B, V\] or \[B, V, 2\]"),
        ({"scores": COLUMNS[:, :2]}, TypeError, r"scores has dtype int64"),
        ({"columns": COLUMNS.int()}, TypeError, r"columns has dtype int32.*long"),
        ({"columns": COLUMNS[:, :3]}, ValueError, r"columns must be \[B, N\] = \(1, 4\)"),
        ({"k": 3}, ValueError, r"k=3 is outside 0..V=2"),
        ({"k": True}, TypeError, r"k must be an int.*bool"),
        ({"k": torch.tensor([1])}, ValueError, r"a tensor k needs length= and width="),
        ({"length": 5}, ValueError, r"length=5 must be in 0..N=4"),
        ({"width": 3}, ValueError, r"width=3 in 0..V=2"),
        ({"valid_mask": torch.ones(1, 4)}, TypeError, r"valid_mask has dtype float32"),
        ({"tables": [torch.zeros(1, 4, 1)] * 4}, ValueError, r"tables has 4 tensors, at most 3"),
        ({"position_ids": torch.zeros(2, 4).long()}, ValueError, r"position_ids must be"),
        ({"padding_side": "both"}, ValueError, r"padding_side='both'"),
    ],
    sample_keep_mask: [
        ({"logits": torch.zeros(2, 5)}, ValueError, r"logits must be \[B, N, 2\]"),
        ({"logits": torch.zeros(2, 5, 3)}, ValueError, r"logits must be.*\(2, 5, 3\)"),
        ({"logits": torch.zeros(2, 5, 2).long()}, TypeError, r"logits has dtype int64"),
        ({"tau": 0.0}, ValueError, r"tau=0.0 must be a number > 0"),
        ({"tau": float("nan")}, ValueError, r"tau=nan"),
        ({"uniform": torch.rand(2, 4)}, ValueError, r"uniform must be \[B, N\] = \(2, 5\)"),
        (
            {"uniform": torch.rand(2, 5), "generator": torch.Generator()},
            ValueError,
            r"generator and uniform are given together; pass one",
        ),
        ({"previous_mask": torch.ones(2, 5)}, TypeError, r"previous_mask has dtype float32"),
        ({"seed": 1, "uniform": torch.rand(2, 5)}, ValueError, r"seed and uniform are given together; pass one"),
        ({"seed": 1.0}, TypeError, r"seed must be an int or an int64 tensor \[1\], got 1.0 of type float"),
        ({"seed": True}, TypeError, r"seed must be an int.*True of type bool"),
        ({"seed": 2**63}, ValueError, r"seed=9223372036854775808 does not fit in an int64; use seed % 2\*\*63"),
        ({"seed": torch.tensor(3)}, ValueError, r"seed must be \[1\]"),
        ({"seed": torch.tensor([3.0])}, TypeError, r"seed has dtype float32.*long"),
        ({"token_ids": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, r"token_ids must be \[B, N\] = \(2, 5\)"),
        ({"token_ids": torch.zeros(2, 5)}, TypeError, r"token_ids has dtype float32.*long"),
        (
            {"token_ids": torch.zeros(2, 5, dtype=torch.int64), "uniform": torch.rand(2, 5)},
            ValueError,
            r"token_ids has no use with uniform",
        ),
    ],
    keep_mask_log_prob: [
        ({"keep_mask": torch.zeros(1, 2).long()}, TypeError, r"keep_mask_log_prob: keep_mask has dtype int64.*bool"),
    ],
}


@pytest.mark.parametrize(
    ("op", "changes", "error", "message"), [(op, *row) for op, table in BAD.items() for row in table]
)
def test_message(op: Callable[..., Any], changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        op(**(GOOD[op] | changes))
