"""actor_score against the same network as a module, plain and compiled.

Useful work: Eq. 11 FLOPs; bytes of the hidden states, the weights and the logits, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import Case, Provider, Row, Settings, Work, checked, compare, graph, our_name
from toprl_kernels import ActorWeights, actor_score, flops
from toprl_kernels.testing import make_actor_weights

STAGE = 1


class PlainActor(nn.Module):
    """The actor as one would write it with nn.Sequential."""

    def __init__(self, weights: ActorWeights) -> None:
        super().__init__()
        d2, d1 = weights.fc1_weight.shape
        norm, fc1, fc2, fc3, head = (
            nn.LayerNorm(d1), nn.Linear(d1, d2), nn.Linear(d2, d2), nn.Linear(d2, d2), nn.Linear(d2, 2)
        )  # fmt: skip
        self.layer1 = nn.Sequential(norm, fc1)
        self.layers23 = nn.Sequential(fc2, nn.GELU(), fc3, nn.GELU(), head)
        self.stage_bias = nn.Parameter(weights.stage_bias.clone())
        for layer, name in ((norm, "norm"), (fc1, "fc1"), (fc2, "fc2"), (fc3, "fc3"), (head, "head")):
            layer.weight = nn.Parameter(getattr(weights, f"{name}_weight").clone())
            layer.bias = nn.Parameter(getattr(weights, f"{name}_bias").clone())
        layers = [parameter for layer in (fc1, fc2, fc3, head) for parameter in (layer.weight, layer.bias)]
        self.leaves = [norm.weight, norm.bias, self.stage_bias, *layers]  # in the order of ActorWeights

    def forward(self, hidden_states: Tensor, stage: int) -> Tensor:
        z = F.gelu(self.layer1(hidden_states) + self.stage_bias[stage])
        local, shared = z.chunk(2, dim=-1)
        return self.layers23(torch.cat([local, shared.mean(dim=1, keepdim=True).expand_as(local)], dim=-1))


@dataclass(frozen=True)
class ActorCase(Case):
    """The policy's logits for ``num_tokens`` hidden states of width ``hidden_size``, policy width ``d2``.

    Mode "fwd+bwd" has the gradients with respect to all weights.
    """

    op = "actor_score"
    num_tokens: int
    hidden_size: int
    d2: int = 256

    @property
    def shape(self) -> str:
        return f"B{self.batch} N{self.num_tokens} d1={self.hidden_size} d2={self.d2}"

    def bench(self, settings: Settings) -> list[Row]:
        device = settings.device
        weights = make_actor_weights(self.hidden_size, self.d2, dtype=self.dtype, device=device)
        plain = PlainActor(weights)
        wide = ActorWeights(*(tensor.double() for tensor in weights))
        for tensor in (*weights, *wide):
            tensor.requires_grad_(self.backward)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(self.batch, self.num_tokens, self.hidden_size, generator=generator).to(device, self.dtype)
        direction = torch.randn(self.batch, self.num_tokens, 2, generator=generator).to(device)

        def results_of(logits: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
            if not self.backward:
                return [logits]
            return [logits.detach(), *torch.autograd.grad(logits, leaves, direction.to(logits.dtype))]

        def ours() -> list[Tensor]:
            return results_of(actor_score(hidden, STAGE, weights), weights)

        def sequential(module: Callable[..., Tensor] = plain) -> list[Tensor]:
            return results_of(module(hidden, STAGE), plain.leaves)

        truth = results_of(actor_score(hidden.double(), STAGE, wide, backend="reference"), wide)
        eager = sequential()
        tokens = self.batch * self.num_tokens
        elements = hidden.numel() + sum(tensor.numel() for tensor in weights) + 2 * tokens
        count = flops.actor_flops(tokens, self.hidden_size, self.d2)
        if self.backward:  # two more products per layer, of which the first needs no gradient of its input
            count = 3 * count - flops.FLOPS_PER_MAC * tokens * self.hidden_size * self.d2
            elements *= 2
        compiled = partial(sequential, graph(plain, fullgraph=True))
        providers = [
            Provider(our_name(device), ours, "ours"),
            Provider("nn.Sequential", sequential),
            Provider("torch.compile of nn.Sequential", compiled, compiled=True),
        ]
        work = Work(count, elements * self.dtype.itemsize)
        return compare(self, providers, lambda got: checked(got, eager, truth, self.dtype), work, settings)
