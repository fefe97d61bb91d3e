"""masked_attention against its peers.

Useful work: a pair (i, j) counts when its weight is not 0, that is j kept or j == i, and j <= i under causality. Two
products of 2 D FLOPs per pair and head forward, five more backward (the gradient by the mask needs no further one).
Bytes: each of query, key, value and output moved once forward; all of them and their gradients once backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench import attention_peers as peers
from bench.common import (
    LEFT_OUT,
    Built,
    Call,
    Check,
    NotAvailableError,
    Provider,
    Row,
    Settings,
    Work,
    checked,
    compare,
    dtype_name,
    our_name,
    shared_labels,
)
from toprl_kernels import masked_attention

ORACLE_ROWS = 512  # query rows of the float64 definition at a time
CLUSTER = 64  # tokens kept or dropped together

BASE_SIZE, BASE_KEEP = 2048, 0.25

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (query, key, value, keep_mask) -> output


@dataclass(frozen=True)
class AttentionCase:
    """Self-attention over one padded-free batch in which every sample keeps ``num_kept`` tokens.

    ``mask``: "hard" is bool; "soft" is uniform in (0, 1), so that no token is dropped and ``keep`` says nothing;
    "straight-through" is float with the values of "hard". ``mode``: "fwd", "fwd+bwd" (query, key, value) or
    "fwd+bwd+mask" (also the gradient by the mask).
    """

    num_tokens: int = BASE_SIZE
    keep: float = BASE_KEEP
    pattern: str = "random"  # or "clustered"
    mask: str = "hard"
    mode: str = "fwd"
    batch: int = 1
    causal: bool = True
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    compiled: bool = False  # whether the peers that need torch.compile take part

    @property
    def num_kept(self) -> int:
        return max(1, round(self.keep * self.num_tokens))

    @property
    def backward(self) -> bool:
        return self.mode != "fwd"

    @property
    def mask_gradient(self) -> bool:
        return self.mode == "fwd+bwd+mask"

    @property
    def shape(self) -> str:
        return f"B{self.batch} H{self.num_heads}/{self.num_kv_heads} N{self.num_tokens} D{self.head_dim}"

    @property
    def kind(self) -> str:
        """What is computed, without the sizes; the ``mode`` column."""
        words = [self.mask, self.mode]
        return " ".join(words if self.causal else [*words, "non-causal"])

    def label(self) -> str:
        keep = "" if self.mask == "soft" else f" keep {self.keep:.0%} {self.pattern}"
        return f"masked_attention {self.kind} {self.shape}{keep} {dtype_name(self.dtype)}"


class Inputs(NamedTuple):
    query: Tensor  # [B, H, N, D]
    key: Tensor  # [B, Hkv, N, D]
    value: Tensor  # [B, Hkv, N, D]
    keep_mask: Tensor  # [B, N], of the case's kind
    keep: Tensor  # [B, N] bool: the mask rounded up
    grad_output: Tensor  # [B, H, N, D]

    def samples(self, chosen: list[int]) -> Inputs:
        return Inputs._make(tensor[chosen] for tensor in self)


def make_keep(case: AttentionCase, generator: torch.Generator) -> Tensor:
    """[B, N] bool with exactly ``num_kept`` True per sample: single tokens at random, or random runs."""
    run = CLUSTER if case.pattern == "clustered" else 1
    rows = []
    for _ in range(case.batch):
        order = torch.randperm(-(-case.num_tokens // run), generator=generator)
        tokens = (order[:, None] * run + torch.arange(run)).flatten()
        tokens = tokens[tokens < case.num_tokens]
        rows.append(torch.zeros(case.num_tokens, dtype=torch.bool).index_fill_(0, tokens[: case.num_kept], True))
    return torch.stack(rows)


def make_inputs(case: AttentionCase, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(num_heads: int) -> Tensor:
        shape = (case.batch, num_heads, case.num_tokens, case.head_dim)
        return torch.randn(*shape, generator=generator).to(device=device, dtype=case.dtype)

    query, grad_output = normal(case.num_heads), normal(case.num_heads)
    key, value = normal(case.num_kv_heads), normal(case.num_kv_heads)
    keep = make_keep(case, generator)
    keep_mask = keep
    if case.mask == "soft":
        keep_mask = torch.rand(case.batch, case.num_tokens, generator=generator).clamp(min=1e-3)
        keep = torch.ones_like(keep)
    elif case.mask == "straight-through":
        keep_mask = keep.float()
    return Inputs(query, key, value, keep_mask.to(device), keep.to(device), grad_output)


def call_of(attention: Attention, x: Inputs, *, backward: bool, mask_gradient: bool) -> Call:
    """Forward, or forward and backward: the results are the output and the gradients that are wanted."""

    def call() -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_(backward) for tensor in (x.query, x.key, x.value)]
        mask_leaf = x.keep_mask.detach().requires_grad_(True) if mask_gradient else x.keep_mask
        with torch.set_grad_enabled(backward):
            output = attention(leaves[0], leaves[1], leaves[2], mask_leaf)
        if not backward:
            return [output]
        wanted = [*leaves, mask_leaf] if mask_gradient else leaves
        return [output, *torch.autograd.grad(output, wanted, x.grad_output)]

    return call


def oracle(case: AttentionCase, x: Inputs) -> list[Tensor]:
    """The definition in float64, a block of query rows at a time: memory N x ORACLE_ROWS per head.

    The queries of the public function are the last tokens of its keys, so the block's keys are put last; without
    causality their order means nothing.
    """
    leaves = [x.query, x.key, x.value, x.keep_mask] if case.mask_gradient else [x.query, x.key, x.value]
    wide = [leaf.double().requires_grad_(case.backward) for leaf in leaves]
    query, key, value = wide[:3]
    mask = wide[3] if case.mask_gradient else x.keep_mask
    outputs, gradients = [], [torch.zeros_like(leaf) for leaf in wide]
    tokens = torch.arange(case.num_tokens, device=query.device)
    for first in range(0, case.num_tokens, ORACLE_ROWS):
        block = tokens[first : first + ORACLE_ROWS]
        last = first + len(block)
        order = tokens[:last] if case.causal else torch.cat([tokens[:first], tokens[last:], block])
        output = masked_attention(
            query[:, :, first:last],
            key[:, :, order],
            value[:, :, order],
            mask[:, order],
            is_causal=case.causal,
            backend="reference",
        )
        outputs.append(output.detach())
        if case.backward:
            parts = torch.autograd.grad(output, wide, x.grad_output[:, :, first:last].double())
            for total, part in zip(gradients, parts, strict=True):
                total += part
    return [torch.cat(outputs, dim=2), *(gradients if case.backward else [])]


def make_check(case: AttentionCase, x: Inputs) -> Callable[[list[Tensor]], Check]:
    """The check of one provider. Of a larger batch only the first and the last sample are looked at."""
    chosen = sorted({0, case.batch - 1})
    few = x.samples(chosen)
    plain = functools.partial(peers.eager_attention, causal=case.causal)
    eager = call_of(plain, few, backward=case.backward, mask_gradient=case.mask_gradient)()
    truth = oracle(case, few)
    return lambda results: checked([result[chosen] for result in results], eager, truth, case.dtype)


def work_of(case: AttentionCase, keep: Tensor) -> Work:
    """See the head of this file. ``keep`` [B, N] bool."""
    if case.causal:
        pairs = int((keep.cumsum(dim=1) + ~keep).sum())
    else:
        pairs = int((keep.sum(dim=1, keepdim=True) + ~keep).sum())
    products = 7 if case.backward else 2
    rows = case.batch * case.num_tokens * case.head_dim * case.dtype.itemsize
    moves = 6 if case.backward else 2  # of a query-like and of a key-like tensor each
    return Work(
        products * 2.0 * case.head_dim * case.num_heads * pairs, moves * rows * (case.num_heads + case.num_kv_heads)
    )


def bench_attention(case: AttentionCase, settings: Settings) -> list[Row]:
    """All providers of one case."""
    x = make_inputs(case, settings.device)
    labels = shared_labels(
        "masked_attention",
        case.kind,
        case.shape,
        case.dtype,
        case.label(),
        batch=case.batch,
        num_tokens=case.num_tokens,
        keep=None if case.mask == "soft" else case.keep,
        pattern="" if case.mask == "soft" else case.pattern,
    )
    return compare(labels, case.dtype, providers_of(case, x), make_check(case, x), work_of(case, x.keep), settings)


@dataclass(frozen=True)
class DecodeCase:
    """One query per sample over ``num_tokens`` cached keys, of which the share ``keep`` is visible."""

    num_tokens: int
    keep: float = 1.0
    batch: int = 1
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.float32

    def label(self) -> str:
        return f"decode B{self.batch} N{self.num_tokens} keep {self.keep:.0%} {dtype_name(self.dtype)}"


def bench_decode(case: DecodeCase, settings: Settings) -> list[Row]:
    """A step of decoding against SDPA with and without the mask. Useful work: the visible keys and values, once."""
    shapes = AttentionCase(
        case.num_tokens, case.keep, batch=case.batch, num_heads=case.num_heads, num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim, dtype=case.dtype,
    )  # fmt: skip
    x = make_inputs(shapes, settings.device)
    query, visible = (
        x.query[:, :, -1:],
        x.keep.index_fill(1, torch.tensor([case.num_tokens - 1]).to(x.keep.device), True),
    )
    visible = visible[:, None, None]

    def ours(q: Tensor = query, k: Tensor = x.key, v: Tensor = x.value, backend: str | None = None) -> list[Tensor]:
        return [masked_attention(q, k, v, x.keep, is_causal=True, backend=backend)]

    def sdpa(mask: Tensor | None) -> Built:
        return Built(lambda: [peers.sdpa(query, x.key, x.value, mask)])

    pairs = float(visible.sum())
    moved = 2 * pairs * case.num_kv_heads * case.head_dim * case.dtype.itemsize
    work = Work(4 * pairs * case.num_heads * case.head_dim, moved)
    labels = shared_labels("decode", "fwd", f"B{case.batch} H{case.num_heads}/{case.num_kv_heads} D{case.head_dim}",
                           case.dtype, case.label(), batch=case.batch, num_tokens=case.num_tokens,
                           keep=case.keep)  # fmt: skip
    providers = [
        Provider(our_name(settings.device), lambda: Built(ours), role="ours"),
        Provider("sdpa bool mask", lambda: sdpa(visible)),
        Provider("sdpa all keys (bound)", lambda: sdpa(None), role="bound"),
    ]
    with torch.no_grad():
        truth = ours(query.double(), x.key.double(), x.value.double(), "reference")
        eager = sdpa(visible).call()
        return compare(
            labels, case.dtype, providers, lambda got: checked(got, eager, truth, case.dtype), work, settings
        )


# -- providers -----------------------------------------------------------------------------------------------------


def providers_of(case: AttentionCase, x: Inputs) -> list[Provider]:
    """Our op, its peers by kind of mask, and the bounds."""

    def run(attention: Attention) -> Call:
        return call_of(attention, x, backward=case.backward, mask_gradient=case.mask_gradient)

    def ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return masked_attention(query, key, value, mask, is_causal=case.causal)

    plain = functools.partial(peers.eager_attention, causal=case.causal)
    found = [
        Provider(our_name(x.query.device), lambda: Built(run(ours)), role="ours"),
        Provider("torch eager (Eq. 7)", lambda: Built(run(plain))),
    ]
    if case.mask == "hard":
        found += _hard_peers(case, x, run)
    else:
        found += _soft_peers(case, x, run, ours)
    found.append(_compiled("torch.compile of eager", case, lambda: Built(run(_compile(plain)))))
    return found + _bounds(case, x)


def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False, fullgraph=True)


def _compiled(name: str, case: AttentionCase, build: Callable[[], Built]) -> Provider:
    def left_out() -> Built:
        raise NotAvailableError(LEFT_OUT)

    return Provider(name, build if case.compiled else left_out, compiled=case.compiled)


def _hard_peers(case: AttentionCase, x: Inputs, run: Callable[[Attention], Call]) -> list[Provider]:
    causal, dtype, keep = case.causal, case.dtype, x.keep

    def sdpa_given(make: Callable[[], Tensor]) -> Built:
        mask = make()
        return Built(run(lambda q, k, v, _: peers.sdpa(q, k, v, mask)), mask.numel() * mask.element_size())

    def flex_given() -> Built:
        block_mask, flex = peers.hard_block_mask(keep, causal), _compile(flex_attention)
        grouped = case.num_heads != case.num_kv_heads
        return Built(run(lambda q, k, v, _: flex(q, k, v, block_mask=block_mask, enable_gqa=grouped)))

    def flex_built() -> Built:
        flex, create = _compile(flex_attention), torch.compile(create_block_mask, dynamic=False)
        grouped = case.num_heads != case.num_kv_heads
        return Built(
            run(
                lambda q, k, v, mask: flex(
                    q, k, v, block_mask=peers.hard_block_mask(mask, causal, create), enable_gqa=grouped
                )
            )
        )

    def flex_compacted() -> Built:
        kept = keep.nonzero()[:, 1].view(case.batch, -1)
        block_mask, flex = peers.flex_compacted_mask(kept, case.num_tokens, causal), _compile(flex_attention)
        return Built(run(lambda q, k, v, _: peers.flex_compacted(flex, q, k, v, kept, block_mask)))

    return [
        Provider("sdpa bool mask", lambda: sdpa_given(lambda: peers.bool_mask(keep, causal))),
        Provider(
            "sdpa bool mask + build",
            lambda: Built(run(lambda q, k, v, mask: peers.sdpa(q, k, v, peers.bool_mask(mask, causal)))),
        ),
        Provider("sdpa float mask", lambda: sdpa_given(lambda: peers.float_mask(keep, causal, dtype))),
        _compiled("flex mask_mod", case, flex_given),
        _compiled("flex mask_mod + BlockMask", case, flex_built),
        _compiled("flex compacted + lse", case, flex_compacted),
    ]


def _soft_peers(case: AttentionCase, x: Inputs, run: Callable[[Attention], Call], ours: Attention) -> list[Provider]:
    def sdpa_built(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return peers.sdpa(query, key, value, peers.float_mask(mask, case.causal, case.dtype))

    def flex_soft() -> Built:
        block_mask = peers.causal_block_mask(case.num_tokens, x.query.device) if case.causal else None
        flex = _compile(flex_attention)
        return Built(run(lambda q, k, v, mask: peers.flex_soft(flex, q, k, v, mask, block_mask)))

    found = [
        Provider("sdpa float mask + build", lambda: Built(run(sdpa_built))),
        _compiled("flex score_mod", case, flex_soft),
    ]
    if case.mask_gradient and x.query.is_cuda:  # parts of our call: what the gradient by the mask adds on a GPU
        for name, backward in (("ours, forward only", False), ("ours, no mask gradient", True)):
            build = functools.partial(call_of, ours, x, backward=backward, mask_gradient=False)
            found.append(Provider(name, lambda build=build: Built(build()), role="bound"))  # type: ignore[misc]
    return found


def _bounds(case: AttentionCase, x: Inputs) -> list[Provider]:
    """Dense attention over all tokens, and over as many tokens as are kept."""
    everything = torch.ones_like(x.keep)

    def dense() -> Built:
        on_cuda = x.query.device.type == "cuda" and case.dtype != torch.float32
        call = call_of(functools.partial(_dense, case.causal), x, backward=case.backward, mask_gradient=False)
        return Built(_with_flash(call) if on_cuda else call)

    def flash() -> Built:
        try:
            from flash_attn import flash_attn_func
        except ImportError:
            raise NotAvailableError("flash-attn is not installed (pip install flash-attn, CUDA only)") from None

        def attention(query: Tensor, key: Tensor, value: Tensor, _: Tensor) -> Tensor:
            rows = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [B, N, H, D]
            output: Tensor = flash_attn_func(*rows, causal=case.causal)
            return output.transpose(1, 2)

        return Built(call_of(attention, x, backward=case.backward, mask_gradient=False))

    found = [
        Provider("sdpa dense (bound)", dense, role="bound", work=work_of(case, everything)),
        Provider("flash-attn dense (bound)", flash, role="bound", work=work_of(case, everything)),
    ]
    if case.mask == "hard":
        found.append(floor_provider(case, x))
    return found


def _dense(causal: bool, query: Tensor, key: Tensor, value: Tensor, _: Tensor) -> Tensor:
    return peers.sdpa(query, key, value, causal=causal)


def _with_flash(call: Call) -> Call:
    def run() -> list[Tensor]:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return call()

    return run


def compacted_inputs(case: AttentionCase, x: Inputs) -> Inputs:
    """Tensors of the kept tokens alone, as a layer after compaction sees them."""
    indices = x.keep.nonzero()[:, 1].view(case.batch, -1)
    return Inputs(
        query=peers.gather_rows(x.query, indices),
        key=peers.gather_rows(x.key, indices),
        value=peers.gather_rows(x.value, indices),
        keep_mask=x.keep_mask.gather(1, indices),
        keep=x.keep.gather(1, indices),
        grad_output=peers.gather_rows(x.grad_output, indices),
    )


def floor_provider(case: AttentionCase, x: Inputs) -> Provider:
    small = compacted_inputs(case, x)

    def build() -> Built:
        return Built(
            call_of(functools.partial(_dense, case.causal), small, backward=case.backward, mask_gradient=False)
        )

    work = work_of(case, small.keep)
    short = work.bytes * case.num_kept / case.num_tokens
    return Provider("sdpa over kept tokens (floor)", build, role="bound", work=Work(work.flops, short))
