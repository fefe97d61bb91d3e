"""sample_keep_mask against the same sampling in plain torch.

Useful work: the logits read once, mask, log-probability and entropy written once. No FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import Case, Provider, Row, Settings, Work, checked, compare, our_name
from toprl_kernels import sample_keep_mask


@dataclass(frozen=True)
class KeepMaskCase(Case):
    """Logits of ``num_tokens`` tokens per sample, with given uniform noise: all providers draw the same mask."""

    op = "sample_keep_mask"
    num_tokens: int

    @property
    def shape(self) -> str:
        return f"B{self.batch} N{self.num_tokens}"

    def bench(self, settings: Settings) -> list[Row]:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(self.batch, self.num_tokens, 2, generator=generator).to(settings.device)
        uniform = torch.rand(self.batch, self.num_tokens, generator=generator).clamp(1e-6, 1 - 1e-6).to(settings.device)

        def ours(values: Tensor = logits, backend: str | None = None) -> list[Tensor]:
            sample = sample_keep_mask(values, uniform=uniform.to(values.dtype), backend=backend)
            return [sample.keep_mask, sample.log_prob, sample.entropy]

        def plain() -> list[Tensor]:
            difference = logits[..., 0] - logits[..., 1]
            keep = difference + uniform.log() - (-uniform).log1p() > 0
            log_keep, log_drop = F.logsigmoid(difference), F.logsigmoid(-difference)
            entropy = -(log_keep.exp() * log_keep + log_drop.exp() * log_drop)
            return [keep.float(), torch.where(keep, log_keep, log_drop), entropy]

        truth, eager = ours(logits.double(), "reference"), plain()
        providers = [Provider(our_name(settings.device), ours, "ours"), Provider("plain torch", plain)]
        work = Work(0.0, 24.0 * uniform.numel())
        return compare(self, providers, lambda got: checked(got, eager, truth, self.dtype), work, settings)
