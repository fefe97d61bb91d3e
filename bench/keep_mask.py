"""sample_keep_mask against the same sampling in plain torch.

Useful work: the logits read once, mask, log-probability and entropy written once. No FLOPs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import Built, Provider, Row, Settings, Work, checked, compare, our_name, shared_labels
from toprl_kernels import sample_keep_mask


@dataclass(frozen=True)
class KeepMaskCase:
    """Logits of ``num_tokens`` tokens per sample, with given uniform noise: all providers draw the same mask."""

    num_tokens: int
    batch: int = 1

    def label(self) -> str:
        return f"sample_keep_mask B{self.batch} N{self.num_tokens}"


def bench_keep_mask(case: KeepMaskCase, settings: Settings) -> list[Row]:
    """All providers of one case, forward."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(case.batch, case.num_tokens, 2, generator=generator).to(settings.device)
    uniform = torch.rand(case.batch, case.num_tokens, generator=generator).clamp(1e-6, 1 - 1e-6).to(settings.device)

    def ours(values: Tensor = logits, backend: str | None = None) -> list[Tensor]:
        sample = sample_keep_mask(values, uniform=uniform.to(values.dtype), backend=backend)
        return [sample.keep_mask, sample.log_prob, sample.entropy]

    def plain() -> list[Tensor]:
        difference = logits[..., 0] - logits[..., 1]
        keep = difference + uniform.log() - (-uniform).log1p() > 0
        log_keep, log_drop = F.logsigmoid(difference), F.logsigmoid(-difference)
        entropy = -(log_keep.exp() * log_keep + log_drop.exp() * log_drop)
        return [keep.float(), torch.where(keep, log_keep, log_drop), entropy]

    labels = shared_labels("sample_keep_mask", "fwd", f"B{case.batch} N{case.num_tokens}", torch.float32, case.label(),
                           batch=case.batch, num_tokens=case.num_tokens)  # fmt: skip
    providers = [
        Provider(our_name(settings.device), lambda: Built(ours), role="ours"),
        Provider("plain torch", lambda: Built(plain)),
    ]
    with torch.no_grad():
        truth, eager = ours(logits.double(), "reference"), plain()
        check = functools.partial(checked, eager=eager, oracle=truth, dtype=torch.float32)
        return compare(labels, torch.float32, providers, check, Work(0.0, 24.0 * uniform.numel()), settings)
