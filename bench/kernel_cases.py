"""Which cases the kernel suite measures: each axis swept around one base case, not the full cross product.

Base of masked_attention: N = 2048 tokens, 25 % kept at random, one sample, causal, a hard mask. Around it:

* N in 576, 1024, 2048, 2880, 4096 for the forward and the forward with backward of a hard mask, and for the forward
  with backward of a soft mask that wants its own gradient;
* 10, 50 and 100 % kept, clustered masks, several samples (at N = 576), the soft mask without a gradient of its own, a
  mask that is exactly 0 or 1 but wants a gradient (straight-through), no causality, other head layouts and dtypes.

``--quick`` keeps the two sizes and the few graphs to compile that fit two minutes on two CPU cores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

PAPER_SIZES = (576, 1024, 2048, 2880, 4096)
BASE_SIZE, BASE_KEEP = 2048, 0.25


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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


@dataclass(frozen=True)
class TopkCase:
    """Selection of ``k`` of ``num_tokens`` hidden states of width ``hidden_size``."""

    num_tokens: int
    k: int
    hidden_size: int
    batch: int = 1
    mode: str = "fwd"
    dtype: torch.dtype = torch.float32
    compiled: bool = False

    @property
    def shape(self) -> str:
        return f"B{self.batch} N{self.num_tokens} K{self.k} d{self.hidden_size}"

    def label(self) -> str:
        return f"topk_compact {self.mode} {self.shape} {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class CacheCase:
    """Compaction of cached keys and values [B, Hkv, N, D] to ``k`` positions."""

    num_tokens: int
    k: int
    batch: int = 1
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> str:
        return f"B{self.batch} Hkv{self.num_kv_heads} N{self.num_tokens} K{self.k} D{self.head_dim}"

    def label(self) -> str:
        return f"compact_cache {self.shape} {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class ActorCase:
    """The policy's logits for ``num_tokens`` hidden states of width ``d1``, policy width ``d2``.

    ``mode`` is "fwd" or "fwd+bwd", the latter with the gradients by all weights.
    """

    num_tokens: int
    d1: int
    d2: int = 256
    mode: str = "fwd"
    batch: int = 1
    dtype: torch.dtype = torch.float32
    compiled: bool = False

    @property
    def shape(self) -> str:
        return f"B{self.batch} N{self.num_tokens} d1={self.d1} d2={self.d2}"

    def label(self) -> str:
        return f"actor_score {self.mode} {self.shape} {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class Plan:
    """The cases of one run, and how long to look at each."""

    attention: tuple[AttentionCase, ...]
    compaction: tuple[AttentionCase, ...]  # what the decoder pays after real pruning; only sizes and dtype count
    topk: tuple[TopkCase, ...]
    cache: tuple[CacheCase, ...]
    actor: tuple[ActorCase, ...]
    seconds: float  # timing per case, all providers together
    min_rounds: int

    @property
    def dtypes(self) -> list[torch.dtype]:
        groups: tuple[tuple[AttentionCase | TopkCase | CacheCase | ActorCase, ...], ...]
        groups = (self.attention, self.compaction, self.topk, self.cache, self.actor)
        return sorted({case.dtype for group in groups for case in group}, key=dtype_name)


def plan_of(quick: bool, device: torch.device) -> Plan:
    """The documented subset for a kind of device."""
    on_cuda = device.type == "cuda"
    base = AttentionCase()
    width = 1024
    if on_cuda:
        base = replace(base, num_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)
        width = 4096
    attention = _quick_attention(base) if quick else _full_attention(base)
    return Plan(
        attention=tuple(attention),
        compaction=tuple(replace(base, num_tokens=n) for n in PAPER_SIZES if not quick or n <= base.num_tokens),
        topk=tuple(dict.fromkeys(_topk(quick, on_cuda, base.dtype, width))),  # the lists of sizes overlap
        cache=tuple(_cache(quick, on_cuda, base.dtype)),
        actor=tuple(_actor(quick, on_cuda, base.dtype)),
        seconds=1.5 if quick else 6.0,
        min_rounds=3 if quick else 5,
    )


def _quick_attention(base: AttentionCase) -> list[AttentionCase]:
    cases = []
    for num_tokens in (576, BASE_SIZE):
        at_size = replace(base, num_tokens=num_tokens)
        cases += [
            replace(at_size, compiled=num_tokens == BASE_SIZE),
            replace(at_size, mode="fwd+bwd"),
            replace(at_size, mask="soft", mode="fwd+bwd+mask"),
        ]
    return cases


def _full_attention(base: AttentionCase) -> list[AttentionCase]:
    hard_modes = [replace(base, mode=mode) for mode in ("fwd", "fwd+bwd")]
    soft = replace(base, mask="soft")
    cases = []
    for num_tokens in PAPER_SIZES:
        sized = [*hard_modes, replace(soft, mode="fwd+bwd+mask")]
        is_base = num_tokens == BASE_SIZE
        cases += [
            replace(case, num_tokens=num_tokens, compiled=case.mode == "fwd" or is_base or base.head_dim == 128)
            for case in sized
        ]
    for case in hard_modes:
        cases += [replace(case, keep=keep) for keep in (0.1, 0.5, 1.0)]
        cases.append(replace(case, pattern="clustered", compiled=True))
        cases += [replace(case, num_tokens=576, batch=batch) for batch in (8, 32)]
    cases += [replace(soft, compiled=True), replace(soft, mode="fwd+bwd", compiled=base.head_dim == 128)]
    cases.append(replace(base, mask="straight-through", mode="fwd+bwd+mask"))
    cases.append(replace(base, causal=False))
    if base.head_dim == 128:  # the plan of a GPU
        cases += [replace(base, keep=1.0, num_tokens=n) for n in PAPER_SIZES if n > BASE_SIZE]
        cases += [replace(base, num_kv_heads=32), replace(base, num_kv_heads=32, head_dim=64)]
        cases += [replace(base, dtype=dtype) for dtype in (torch.float16, torch.float32)]
    else:
        cases += [replace(base, num_kv_heads=8, head_dim=128), replace(base, dtype=torch.bfloat16)]
    return cases


def _topk(quick: bool, on_cuda: bool, dtype: torch.dtype, width: int) -> list[TopkCase]:
    cases = [TopkCase(576, 192, width, batch=batch, dtype=dtype) for batch in (1, 8)]
    cases += [TopkCase(2880, 960, 4096, dtype=dtype), TopkCase(576, 192, 4096, batch=8, dtype=dtype)]
    base = TopkCase(BASE_SIZE, 512, 4096, dtype=dtype, compiled=not quick)
    if quick:
        return [*cases, base]
    cases += [replace(base, num_tokens=n, k=n // 4, compiled=n == BASE_SIZE) for n in PAPER_SIZES]
    cases += [replace(base, k=round(keep * BASE_SIZE), compiled=False) for keep in (0.1, 0.5, 1.0)]
    cases += [TopkCase(576, 144, 4096, batch=32, dtype=dtype), TopkCase(65536, 16384, 256, dtype=dtype)]
    cases.append(replace(base, mode="fwd+bwd", compiled=False))
    if on_cuda:  # 64 MB and more: bound by the copy, not by the launches
        cases += [TopkCase(2880, 720, 4096, batch=batch, dtype=dtype) for batch in (16, 32)]
    return cases


def _cache(quick: bool, on_cuda: bool, dtype: torch.dtype) -> list[CacheCase]:
    sizes = (BASE_SIZE,) if quick else PAPER_SIZES
    cases = [CacheCase(n, n // 4, dtype=dtype) for n in sizes]
    if not quick:
        cases.append(CacheCase(576, 144, batch=32 if on_cuda else 8, dtype=dtype))
    return cases


def _actor(quick: bool, on_cuda: bool, dtype: torch.dtype) -> list[ActorCase]:
    modes = ("fwd", "fwd+bwd")
    few = [ActorCase(32, 64, 16, mode=mode, dtype=dtype) for mode in modes]  # what surrounds the products counts
    if quick:
        return [*few, *(ActorCase(576, 1024, mode=mode, dtype=dtype) for mode in modes)]
    cases = [*few, *(ActorCase(576, 1024, mode=mode, dtype=dtype, compiled=True) for mode in modes)]
    cases += [ActorCase(n, 4096, dtype=dtype, compiled=n in (576, 2880)) for n in PAPER_SIZES]
    cases.append(ActorCase(BASE_SIZE, 4096, mode="fwd+bwd", dtype=dtype))
    cases.append(ActorCase(576, 4096, batch=32 if on_cuda else 8, dtype=dtype))
    return cases
