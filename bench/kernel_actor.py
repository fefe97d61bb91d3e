"""actor_score against the same network as a module, plain and compiled.

Useful work: Eq. 11 FLOPs; bytes of the hidden states, the weights and the logits, each once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.kernel_cases import ActorCase
from bench.kernel_measure import (
    LEFT_OUT,
    Built,
    NotAvailableError,
    Provider,
    Row,
    Settings,
    Work,
    checked,
    compare,
    our_name,
    shared_labels,
)
from toprl_kernels import ActorWeights, actor_score, flops
from toprl_kernels.testing import make_actor_weights

STAGE = 1


class PlainActor(nn.Module):
    """The actor as one would write it with nn.Sequential."""

    def __init__(self, weights: ActorWeights) -> None:
        super().__init__()
        d2, d1 = weights.fc1_weight.shape
        norm, fc1 = nn.LayerNorm(d1), nn.Linear(d1, d2)
        fc2, fc3, head = nn.Linear(d2, d2), nn.Linear(d2, d2), nn.Linear(d2, 2)
        self.layer1 = nn.Sequential(norm, fc1)
        self.layers23 = nn.Sequential(fc2, nn.GELU(), fc3, nn.GELU(), head)
        self.stage_bias = nn.Parameter(weights.stage_bias.clone())
        norm.weight, norm.bias = nn.Parameter(weights.norm_weight.clone()), nn.Parameter(weights.norm_bias.clone())
        for layer, name in ((fc1, "fc1"), (fc2, "fc2"), (fc3, "fc3"), (head, "head")):
            layer.weight = nn.Parameter(getattr(weights, f"{name}_weight").clone())
            layer.bias = nn.Parameter(getattr(weights, f"{name}_bias").clone())

    def forward(self, hidden_states: Tensor, stage: int) -> Tensor:
        z = F.gelu(self.layer1(hidden_states) + self.stage_bias[stage])
        local, shared = z.chunk(2, dim=-1)
        return self.layers23(torch.cat([local, shared.mean(dim=1, keepdim=True).expand_as(local)], dim=-1))


@torch.no_grad()
def bench_actor(case: ActorCase, settings: Settings) -> list[Row]:
    weights = make_actor_weights(case.d1, case.d2, dtype=case.dtype, device=settings.device)
    plain = PlainActor(weights)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.batch, case.num_tokens, case.d1, generator=generator).to(settings.device, case.dtype)

    def compiled() -> Built:
        if not case.compiled:
            raise NotAvailableError(LEFT_OUT)
        module = torch.compile(plain, dynamic=False, fullgraph=True)
        return Built(lambda: [module(hidden, STAGE)])

    wide = ActorWeights(*(tensor.double() for tensor in weights))
    truth = [actor_score(hidden.double(), STAGE, wide, backend="reference")]
    eager = [plain(hidden, STAGE)]
    tokens = case.batch * case.num_tokens
    elements = hidden.numel() + sum(tensor.numel() for tensor in weights) + 2 * tokens
    work = Work(flops.actor_flops(tokens, case.d1, case.d2), elements * case.dtype.itemsize)
    labels = shared_labels(
        "actor_score",
        "fwd",
        case.shape,
        case.dtype,
        case.label(),
        batch=case.batch,
        num_tokens=case.num_tokens,
        hidden_size=case.d1,
    )
    providers = [
        Provider(our_name(settings.device), lambda: Built(lambda: [actor_score(hidden, STAGE, weights)]), "ours"),
        Provider("nn.Sequential", lambda: Built(lambda: [plain(hidden, STAGE)])),
        Provider("torch.compile of nn.Sequential", compiled, compiled=case.compiled),
    ]
    return compare(
        labels, case.dtype, providers, lambda results: checked(results, eager, truth, case.dtype), work, settings
    )
