"""masked_attention against its peers.

Useful work: a pair (i, j) counts when its weight is not 0, that is j kept or j == i, and j <= i under causality. Two
products of 2 D FLOPs per pair and head forward, five more backward (the gradient of the mask needs no further one).
Bytes: each of query, key, value and output moved once forward; all of them and their gradients once backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench import attention_peers as peers
from bench.common import Call, Case, Checker, Provider, Row, Settings, Work, checked, compare, graph, our_name
from toprl_kernels import masked_attention

ORACLE_ROWS = 512  # query rows of the float64 definition at a time
CLUSTER = 64  # tokens kept or dropped together
BASE_SIZE, BASE_KEEP = 2048, 0.25

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (query, key, value, keep_mask) -> output


@dataclass(frozen=True)
class AttentionCase(Case):
    """Self-attention over one padded-free batch in which every sample keeps ``num_kept`` tokens.

    ``mask``: "hard" is bool; "soft" is uniform in (0, 1), so that no token is dropped and ``keep`` says nothing;
    "straight-through" is float with the values of "hard". ``mode``: "fwd", "fwd+bwd" (query, key, value) or
    "fwd+bwd+mask" (also the gradient of the mask).
    """

    op = "masked_attention"
    num_tokens: int = BASE_SIZE
    keep: float | None = BASE_KEEP
    pattern: str = "random"  # or "clustered"
    mask: str = "hard"
    causal: bool = True
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64

    @property
    def num_kept(self) -> int:
        return max(1, round((self.keep or 1.0) * self.num_tokens))

    @property
    def mask_gradient(self) -> bool:
        return self.mode == "fwd+bwd+mask"

    @property
    def shape(self) -> str:
        return f"B{self.batch} H{self.num_heads}/{self.num_kv_heads} N{self.num_tokens} D{self.head_dim}"

    @property
    def kind(self) -> str:
        return f"{self.mask} {self.mode}" + ("" if self.causal else " non-causal")

    @property
    def share(self) -> str:
        return "" if self.mask == "soft" else f" keep {self.keep:.0%} {self.pattern}"

    def labels(self) -> Row:
        return super().labels() | ({"keep": None, "pattern": ""} if self.mask == "soft" else {})

    def bench(self, settings: Settings) -> list[Row]:
        x = make_inputs(self, settings.device)
        return compare(self, providers_of(self, x), make_check(self, x), work_of(self, x.keep), settings)


class Inputs(NamedTuple):
    query: Tensor  # [B, H, N, D]
    key: Tensor  # [B, Hkv, N, D]
    value: Tensor  # [B, Hkv, N, D]
    keep_mask: Tensor  # [B, N], of the case's kind
    keep: Tensor  # [B, N] bool: the mask rounded up
    grad_output: Tensor  # [B, H, N, D]


def make_keep(case: AttentionCase, generator: torch.Generator) -> Tensor:
    """[B, N] bool with exactly ``num_kept`` True per sample: single tokens at random, or random runs."""
    run = CLUSTER if case.pattern == "clustered" else 1
    keep = torch.zeros(case.batch, case.num_tokens, dtype=torch.bool)
    for row in keep:
        order = torch.randperm(-(-case.num_tokens // run), generator=generator)
        tokens = (order[:, None] * run + torch.arange(run)).flatten()
        row[tokens[tokens < case.num_tokens][: case.num_kept]] = True
    return keep


def make_inputs(case: AttentionCase, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(num_heads: int) -> Tensor:
        shape = (case.batch, num_heads, case.num_tokens, case.head_dim)
        return torch.randn(*shape, generator=generator).to(device=device, dtype=case.dtype)

    query, grad_output = normal(case.num_heads), normal(case.num_heads)
    key, value = normal(case.num_kv_heads), normal(case.num_kv_heads)
    keep = make_keep(case, generator)
    keep_mask = keep.float() if case.mask == "straight-through" else keep
    if case.mask == "soft":
        keep_mask = torch.rand(case.batch, case.num_tokens, generator=generator).clamp(min=1e-3)
        keep = torch.ones_like(keep)
    return Inputs(query, key, value, keep_mask.to(device), keep.to(device), grad_output)


def call_of(attention: Attention, x: Inputs, *, backward: bool, mask_gradient: bool = False) -> Call:
    """Forward, or forward and backward: the results are the output and the gradients that are wanted."""

    def call() -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_(backward) for tensor in (x.query, x.key, x.value)]
        mask = x.keep_mask.detach().requires_grad_(True) if mask_gradient else x.keep_mask
        output = attention(leaves[0], leaves[1], leaves[2], mask)
        wanted = [*leaves, mask] if mask_gradient else leaves
        return [output, *(torch.autograd.grad(output, wanted, x.grad_output) if backward else ())]

    return call


def oracle(case: AttentionCase, x: Inputs) -> list[Tensor]:
    """The definition in float64, a block of query rows at a time: memory N x ORACLE_ROWS per head.

    The queries of the public function are the last tokens of its keys, so the block's keys are put last; without
    causality their order means nothing.
    """
    leaves = [x.query, x.key, x.value, x.keep_mask] if case.mask_gradient else [x.query, x.key, x.value]
    wide = [leaf.double().requires_grad_(case.backward) for leaf in leaves]
    query, key, value, mask = [*wide, x.keep_mask][:4]
    outputs, gradients = [], [torch.zeros_like(leaf) for leaf in wide]
    tokens = torch.arange(case.num_tokens, device=query.device)
    for first in range(0, case.num_tokens, ORACLE_ROWS):
        block = tokens[first : first + ORACLE_ROWS]
        last = first + len(block)
        order = tokens[:last] if case.causal else torch.cat([tokens[:first], tokens[last:], block])
        keys = (key[:, :, order], value[:, :, order], mask[:, order])
        output = masked_attention(query[:, :, first:last], *keys, is_causal=case.causal, backend="reference")
        outputs.append(output.detach())
        if case.backward:
            parts = torch.autograd.grad(output, wide, x.grad_output[:, :, first:last].double())
            for total, part in zip(gradients, parts, strict=True):
                total += part
    return [torch.cat(outputs, dim=2), *(gradients if case.backward else [])]


def make_check(case: AttentionCase, x: Inputs) -> Checker:
    """The check of one provider. Of a larger batch only the first and the last sample are looked at."""
    chosen = sorted({0, case.batch - 1})
    few = Inputs._make(tensor[chosen] for tensor in x)
    plain = partial(peers.eager_attention, causal=case.causal)
    eager = call_of(plain, few, backward=case.backward, mask_gradient=case.mask_gradient)()
    truth = oracle(case, few)
    return lambda results: checked([result[chosen] for result in results], eager, truth, case.dtype)


def work_of(case: AttentionCase, keep: Tensor) -> Work:
    """See the head of this file. ``keep`` [B, N] bool."""
    seen = keep.cumsum(dim=1) if case.causal else keep.sum(dim=1, keepdim=True)
    pairs = int((seen + ~keep).sum())
    products, moves = (7, 6) if case.backward else (2, 2)  # moves of a query-like and of a key-like tensor each
    moved = moves * keep.numel() * case.head_dim * case.dtype.itemsize * (case.num_heads + case.num_kv_heads)
    return Work(products * 2.0 * case.head_dim * case.num_heads * pairs, moved)


# -- providers -----------------------------------------------------------------------------------------------------


def providers_of(case: AttentionCase, x: Inputs) -> list[Provider]:
    """Our op, its peers by kind of mask, and the bounds: attention over all tokens, and over the kept ones alone."""
    causal, batch, num_tokens = case.causal, case.batch, case.num_tokens
    run = partial(call_of, x=x, backward=case.backward, mask_gradient=case.mask_gradient)
    flex = partial(graph(flex_attention, fullgraph=True), enable_gqa=case.num_heads != case.num_kv_heads)
    eager = partial(peers.eager_attention, causal=causal)
    flash = x.query.is_cuda and case.dtype != torch.float32

    def ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return masked_attention(query, key, value, mask, is_causal=causal)

    def dense(query: Tensor, key: Tensor, value: Tensor, _: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else contextlib.nullcontext():
            return peers.sdpa(query, key, value, causal=causal)

    providers = [Provider(our_name(x.query.device), run(ours), "ours"), Provider("torch eager (Eq. 7)", run(eager))]
    if case.mask == "hard":
        kept = x.keep.nonzero()[:, 1].view(batch, -1)
        bool_mask = cache(lambda: peers.bool_mask(x.keep, causal))
        float_mask = cache(lambda: peers.float_mask(x.keep, causal, case.dtype))
        block_mask = cache(lambda: peers.hard_block_mask(x.keep, causal))
        compacted = cache(lambda: peers.flex_compacted_mask(kept, num_tokens, causal))
        create = graph(create_block_mask)
        build_flex = lambda q, k, v, m: flex(q, k, v, block_mask=peers.hard_block_mask(m, causal, create))  # noqa: E731
        merge = lambda q, k, v, _: peers.flex_compacted(flex, q, k, v, kept, compacted())  # noqa: E731
        cells = batch * num_tokens**2
        providers += [
            Provider("sdpa bool mask", run(lambda q, k, v, _: peers.sdpa(q, k, v, bool_mask())), resident=cells),
            Provider("sdpa bool mask + build", run(lambda q, k, v, m: peers.sdpa(q, k, v, peers.bool_mask(m, causal)))),
            Provider("sdpa float mask", run(lambda q, k, v, _: peers.sdpa(q, k, v, float_mask())),
                     resident=cells * case.dtype.itemsize),
            Provider("flex mask_mod", run(lambda q, k, v, _: flex(q, k, v, block_mask=block_mask())), compiled=True),
            Provider("flex mask_mod + BlockMask", run(build_flex), compiled=True),
            Provider("flex compacted + lse", run(merge), compiled=True),
        ]  # fmt: skip
    else:
        past = cache(lambda: peers.causal_block_mask(num_tokens, x.query.device) if causal else None)
        given = lambda q, k, v, m: peers.sdpa(q, k, v, peers.float_mask(m, causal, case.dtype))  # noqa: E731
        score = lambda q, k, v, m: peers.flex_soft(flex, q, k, v, m, past())  # noqa: E731
        providers += [
            Provider("sdpa float mask + build", run(given)),
            Provider("flex score_mod", run(score), compiled=True),
        ]
        if case.mask_gradient and x.query.is_cuda:  # parts of our call: what the gradient of the mask adds on a GPU
            providers.append(Provider("ours, forward only", call_of(ours, x, backward=False), "bound"))
            providers.append(Provider("ours, no mask gradient", call_of(ours, x, backward=True), "bound"))
    providers.append(Provider("torch.compile of eager", run(graph(eager, fullgraph=True)), compiled=True))
    over_all = call_of(dense, x, backward=case.backward)
    providers.append(Provider("sdpa dense (bound)", over_all, "bound", work_of(case, torch.ones_like(x.keep))))
    if case.mask == "hard":  # tensors of the kept tokens alone, as a layer after compaction sees them
        small = Inputs._make(t.gather(1, kept) if t.ndim == 2 else peers.gather_rows(t, kept) for t in x)
        call, work = call_of(dense, small, backward=case.backward), work_of(case, small.keep)
        providers.append(Provider("sdpa over kept tokens (floor)", call, "bound", work))
    return providers


# -- decoding ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodeCase(AttentionCase):
    """One query per sample over ``num_tokens`` cached keys, of which the share ``keep`` is visible."""

    op = "decode"
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    def bench(self, settings: Settings) -> list[Row]:
        """A step of decoding against SDPA with and without the mask. Useful work: visible keys and values, once."""
        x = make_inputs(self, settings.device)
        query = x.query[:, :, -1:]
        visible = x.keep.clone()
        visible[:, -1] = True
        pairs = float(visible.sum())

        def ours(q: Tensor = query, k: Tensor = x.key, v: Tensor = x.value, backend: str | None = None) -> list[Tensor]:
            return [masked_attention(q, k, v, x.keep, is_causal=True, backend=backend)]

        def sdpa(mask: Tensor | None = visible[:, None, None]) -> list[Tensor]:
            return [peers.sdpa(query, x.key, x.value, mask)]

        providers = [
            Provider(our_name(settings.device), ours, "ours"),
            Provider("sdpa bool mask", sdpa),
            Provider("sdpa all keys (bound)", lambda: sdpa(None), "bound"),
        ]
        truth, eager = ours(query.double(), x.key.double(), x.value.double(), "reference"), sdpa()
        moved = 2 * pairs * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        work = Work(4 * pairs * self.num_heads * self.head_dim, moved)
        return compare(self, providers, lambda got: checked(got, eager, truth, self.dtype), work, settings)
