"""actor_score against the same network as a module, plain and compiled.

Useful work: Eq. 11 FLOPs; bytes of the hidden states, the weights and the logits, each once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import (
    LEFT_OUT,
    Built,
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
from toprl_kernels import ActorWeights, actor_score, flops
from toprl_kernels.testing import make_actor_weights

STAGE = 1


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
        layers = [parameter for layer in (fc1, fc2, fc3, head) for parameter in (layer.weight, layer.bias)]
        self.leaves = [norm.weight, norm.bias, self.stage_bias, *layers]  # in the order of ActorWeights

    def forward(self, hidden_states: Tensor, stage: int) -> Tensor:
        z = F.gelu(self.layer1(hidden_states) + self.stage_bias[stage])
        local, shared = z.chunk(2, dim=-1)
        return self.layers23(torch.cat([local, shared.mean(dim=1, keepdim=True).expand_as(local)], dim=-1))


def bench_actor(case: ActorCase, settings: Settings) -> list[Row]:
    with torch.set_grad_enabled(case.mode == "fwd+bwd"):
        return _bench(case, settings)


def _bench(case: ActorCase, settings: Settings) -> list[Row]:
    backward = case.mode == "fwd+bwd"
    weights = make_actor_weights(case.d1, case.d2, dtype=case.dtype, device=settings.device)
    plain = PlainActor(weights)
    wide = ActorWeights(*(tensor.double() for tensor in weights))
    if backward:
        for tensor in (*weights, *wide):
            tensor.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.batch, case.num_tokens, case.d1, generator=generator).to(settings.device, case.dtype)

    def results_of(logits: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
        if not backward:
            return [logits]
        return [logits.detach(), *torch.autograd.grad(logits, leaves, direction.to(logits.dtype))]

    def ours() -> list[Tensor]:
        return results_of(actor_score(hidden, STAGE, weights), weights)

    def sequential(module: Callable[..., Tensor] = plain) -> list[Tensor]:
        return results_of(module(hidden, STAGE), plain.leaves)

    def compiled() -> Built:
        if not case.compiled:
            raise NotAvailableError(LEFT_OUT)
        return Built(functools.partial(sequential, torch.compile(plain, dynamic=False, fullgraph=True)))

    direction = torch.randn(case.batch, case.num_tokens, 2, generator=generator).to(settings.device)
    truth = results_of(actor_score(hidden.double(), STAGE, wide, backend="reference"), wide)
    eager = sequential()
    tokens = case.batch * case.num_tokens
    elements = hidden.numel() + sum(tensor.numel() for tensor in weights) + 2 * tokens
    count = flops.actor_flops(tokens, case.d1, case.d2)
    if backward:  # two more products per layer, of which the first needs no gradient by its input
        count = 3 * count - flops.FLOPS_PER_MAC * tokens * case.d1 * case.d2
        elements *= 2
    work = Work(count, elements * case.dtype.itemsize)
    labels = shared_labels(
        "actor_score",
        case.mode,
        case.shape,
        case.dtype,
        case.label(),
        batch=case.batch,
        num_tokens=case.num_tokens,
        hidden_size=case.d1,
    )
    providers = [
        Provider(our_name(settings.device), lambda: Built(ours), "ours"),
        Provider("nn.Sequential", lambda: Built(sequential)),
        Provider("torch.compile of nn.Sequential", compiled, compiled=case.compiled),
    ]
    return compare(
        labels, case.dtype, providers, lambda results: checked(results, eager, truth, case.dtype), work, settings
    )
