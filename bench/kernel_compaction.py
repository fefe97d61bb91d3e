"""Attention after real compaction: attention among the kept tokens against its floor, with and without their gathering.

A later decoder layer attends over the kept tokens only; their hidden states were gathered once, by topk_compact. To
gather query, key and value in front of each call is what a model without compaction would have to do. The definition is
masked_attention over all tokens, of which the kept rows are looked at. Useful work as in kernel_attention.py, of the
kept tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from bench import kernel_peers as peers
from bench.kernel_attention import call_of, compacted_inputs, floor_provider, make_inputs, oracle
from bench.kernel_cases import AttentionCase
from bench.kernel_measure import Built, Check, Provider, Row, Settings, checked, compare, shared_labels
from toprl_kernels import masked_attention


def bench_compaction(case: AttentionCase, settings: Settings) -> list[Row]:
    """All providers of one case, whose mode and mask are those of the hard forward."""
    x = make_inputs(case, settings.device)
    indices = x.keep.nonzero()[:, 1].view(case.batch, -1)
    small = compacted_inputs(case, x)
    work = floor_provider(case, x).work
    assert work is not None

    def gather_and_attend() -> list[Tensor]:
        query, key, value = (peers.gather_rows(tensor, indices) for tensor in (x.query, x.key, x.value))
        return [peers.sdpa(query, key, value, causal=True)]

    def attend() -> list[Tensor]:
        return [peers.sdpa(small.query, small.key, small.value, causal=True)]

    def masked_all_kept() -> list[Tensor]:
        return [masked_attention(small.query, small.key, small.value, small.keep, is_causal=True)]

    def check(results: list[Tensor]) -> Check:
        return checked(results, eager, truth, case.dtype)

    def kept_rows(results: Sequence[Tensor]) -> list[Tensor]:
        return [peers.gather_rows(result, indices) for result in results]

    plain = functools.partial(peers.eager_attention, causal=True)
    with torch.no_grad():
        eager = kept_rows(call_of(plain, x, backward=False, mask_gradient=False)())
        truth = kept_rows(oracle(case, x))
    labels = shared_labels(
        "compacted_attention",
        "fwd",
        f"{case.shape} K{case.num_kept}",
        case.dtype,
        f"compaction of {case.label()}",
        batch=case.batch,
        num_tokens=case.num_tokens,
        keep=case.keep,
        pattern=case.pattern,
    )
    providers = [
        Provider("masked_attention, all kept", lambda: Built(masked_all_kept), role="ours"),
        Provider("gather q, k, v + sdpa", lambda: Built(gather_and_attend), role="ours"),
        Provider("sdpa over kept tokens (floor)", lambda: Built(attend), role="bound"),
    ]
    with torch.no_grad():
        return compare(labels, case.dtype, providers, check, work, settings)
