"""prune_stage: eager and Triton against the definition, and the definition against what a stage is for."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from toprl_kernels import PruneStageOutput, prune_stage, topk_compact


def make_case(seed: int, device: str = "cpu", tokens: int | None = None) -> tuple[list, dict]:
    """A stage of ragged samples with padding anywhere, special scores, and everything that may travel along."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    batch, tokens = choose.randint(1, 3), tokens or choose.randint(1, 60)
    scored = torch.rand(batch, tokens) < choose.random()
    width = int(scored.sum(1).max())
    columns = torch.where(scored, scored.cumsum(1) - 1, -1)
    shape = (batch, width, 2) if choose.random() < 0.5 else (batch, width)
    scores = torch.randn(shape).round(decimals=choose.randint(0, 1))
    special = torch.rand(shape)
    for low, value in ((0.9, torch.nan), (0.93, torch.inf), (0.96, -torch.inf)):
        scores[(special > low) & (special < low + 0.03)] = value
    scores = scores.to(choose.choice([torch.float32, torch.float16, torch.bfloat16]))
    valid = torch.rand(batch, tokens) < 0.8 if choose.random() < 0.5 else torch.ones(batch, tokens, dtype=torch.bool)
    k = torch.tensor([choose.randint(-1, width + 1) for _ in range(batch)])
    kept = torch.minimum((scored & valid).sum(1), k.clamp(0, width))
    length = int((kept + (~scored & valid).sum(1)).max())
    before = tokens + 7  # earlier stages dropped seven
    origins = torch.stack([torch.randperm(before)[:tokens].sort().values for _ in range(batch)])
    options = dict(
        length=choose.randint(length, tokens), width=choose.randint(int(kept.max()), width), valid_mask=valid,
        origins=origins, raster=torch.randint(0, 99, (batch, width)), padding_side=choose.choice(["left", "right"]),
        position_ids=torch.randint(0, 99, choose.choice([(1, before), (batch, before), (3, batch, before)])),
        tables=[torch.randn(choose.choice([1, batch]), before, 6), torch.randn(1, before, 3, dtype=torch.complex64)],
    )  # fmt: skip
    if choose.random() < 0.3:
        k = choose.randint(0, width)
        kept = (scored & valid).sum(1).clamp(max=k)
        options["length"], options["width"] = int((kept + (~scored & valid).sum(1)).max()), k
    if choose.random() < 0.3:
        del options["origins"]
    hidden = torch.randn(batch, tokens, choose.choice([3, 8]))

    def moved(value: object) -> object:
        if isinstance(value, list):
            return [part.to(device) for part in value]
        return value.to(device) if isinstance(value, Tensor) else value

    positional = [moved(value) for value in (hidden, scores, columns, k)]
    return positional, {name: moved(value) for name, value in options.items()}


def assert_equal(got: PruneStageOutput, want: PruneStageOutput) -> None:
    for name, left, right in zip(PruneStageOutput._fields, got, want, strict=True):
        pairs = zip(left, right, strict=True) if name == "tables" else [(left, right)]  # type: ignore[arg-type]
        for one, other in pairs:
            assert (one is None) == (other is None), name
            assert one is None or (one.dtype == other.dtype and torch.equal(one, other)), name  # type: ignore[union-attr]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("seed", range(24))
def test_fuzz(seed: int, device: str) -> None:
    positional, options = make_case(seed, device)
    want = prune_stage(*positional, **options, backend="reference")
    for backend in ("eager", "triton"):
        assert_equal(prune_stage(*positional, **options, backend=backend), want)


def test_more_tokens_than_registers_hold(device: str) -> None:
    """Ties, kept text and padding on both sides of the borders between chunks."""
    positional, options = make_case(3, device, tokens=4500)
    assert_equal(
        prune_stage(*positional, **options, backend="triton"), prune_stage(*positional, **options, backend="eager")
    )


def test_hand_case(backend: str, device: str) -> None:
    """Text stays whatever the scores; a policy's +inf does not push it out, and NaN ranks last."""
    hidden = torch.arange(6.0, device=device).view(1, 6, 1)
    columns = torch.tensor([[-1, 0, 1, 2, 3, -1]], device=device)
    scores = torch.tensor([[torch.nan, torch.inf, 1.0, 1.0]], device=device)
    table = torch.arange(6.0, device=device).view(1, 6, 1) * 10
    out = prune_stage(hidden, scores, columns, 2, tables=[table], backend=backend)
    assert out.hidden_states.flatten().tolist() == [0, 2, 3, 5]
    assert out.indices.tolist() == out.origins.tolist() == [[0, 2, 3, 5]]
    assert out.columns.tolist() == [[-1, 0, 1, -1]]
    assert (out.slots.tolist(), out.raster.tolist(), out.listed.tolist()) == ([[1, 2]], [[1, 2]], [[True, True]])
    assert out.tables[0].flatten().tolist() == [0, 20, 30, 50]
    assert out.position_ids is None


def test_two_stages_are_one_of_the_second(backend: str, device: str) -> None:
    """What a stage returns is what the next begins with: the same as its selection over the whole sequence."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 20, 4, device=device)
    columns = torch.full((2, 20), -1, device=device)
    columns[:, 3:15] = torch.arange(12, device=device)
    positions = torch.arange(20, device=device)[None] + 5
    first = prune_stage(hidden, torch.randn(2, 12, device=device), columns, 8, position_ids=positions, backend=backend)
    scores = torch.randn(2, 8, device=device)
    second = prune_stage(
        first.hidden_states, scores, first.columns, 5,
        origins=first.origins, raster=first.raster, position_ids=positions, backend=backend,
    )  # fmt: skip
    best = topk_compact(first.raster[..., None], scores, 5, backend="reference").hidden_states[..., 0]
    assert torch.equal(second.raster, best)
    assert torch.equal(second.hidden_states, hidden.gather(1, second.origins[..., None].expand(-1, -1, 4)))
    assert torch.equal(second.position_ids, second.origins + 5)
    assert torch.equal(second.origins.gather(1, second.slots), best + 3)


def test_gradient_goes_to_the_kept_rows(backend: str, device: str) -> None:
    positional, options = make_case(5, device)
    hidden = positional[0].requires_grad_()
    out = prune_stage(*positional, **options, backend=backend)
    assert not any(table.requires_grad for table in out.tables)  # or checkpoints would run the stage's backward again
    weight = torch.randn_like(out.hidden_states)
    (gradient,) = torch.autograd.grad((out.hidden_states * weight).sum(), hidden)
    want = torch.zeros_like(gradient)
    for sample, indices in enumerate(out.indices.tolist()):
        for slot, index in enumerate(indices):
            if index >= 0:
                want[sample, index] = weight[sample, slot]
    assert torch.equal(gradient, want)


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_a_length_that_is_too_short_writes_nowhere_else(name: str, device: str) -> None:
    columns = torch.tensor([[-1, 0, -1, 1], [-1, 0, -1, 1]], device=device)
    out = prune_stage(torch.ones(2, 4, 1, device=device), columns[:, :2].float(), columns, 2, length=2, backend=name)
    assert out.hidden_states.shape == (2, 2, 1)
