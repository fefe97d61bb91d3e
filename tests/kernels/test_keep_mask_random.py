"""The noise of sample_keep_mask: the published generator, the same bits everywhere, never 0 or 1."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from toprl_kernels import keep_mask_log_prob, sample_keep_mask
from toprl_kernels.keep_mask import triton as kernels
from toprl_kernels.keep_mask.eager import philox, token_uniform

BACKENDS = ["reference", "eager", "triton"]
# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, output
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
SEEDS = [0, 1, -1, 2**31, 2**32 + 7, 2**63 - 1, -(2**63), 0x299F31D0A4093822]


@triton.jit
def uniform_kernel(seed_ptr, tokens_ptr, out_ptr, total, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tokens = tl.load(tokens_ptr + offsets, mask=offsets < total, other=0)
    tl.store(out_ptr + offsets, kernels.token_uniform(tl.load(seed_ptr), tokens), mask=offsets < total)


def triton_uniform(seed: Tensor, tokens: Tensor) -> Tensor:
    out = torch.empty(tokens.shape, device=tokens.device)
    uniform_kernel[(1,)](seed, tokens, out, tokens.numel(), BLOCK=triton.next_power_of_2(tokens.numel()))
    return out


def seed_tensor(seed: int, device: str) -> Tensor:
    return torch.full((1,), seed, dtype=torch.int64, device=device)


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], want: list[int]) -> None:
    words = philox([torch.tensor([word]) for word in counter], [torch.tensor([word]) for word in key])
    assert [int(word) for word in words] == want


def test_known_answer_is_what_a_token_gets(device: str) -> None:
    """Seed 0 and token 0 are the first test vector; the second half of its counter is 0 for every token."""
    want = ((0x6627E8D5 >> 9) + 0.5) / 2**23
    token = torch.zeros(1, dtype=torch.int64, device=device)
    assert token_uniform(seed_tensor(0, device), token).item() == want
    assert triton_uniform(seed_tensor(0, device), token).item() == want


@pytest.mark.parametrize("seed", SEEDS)
def test_bits_are_equal(seed: int, device: str) -> None:
    ids = [0, 1, 2, 576, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 3, 2**63 - 1, -1]
    tokens = torch.cat([torch.tensor(ids), torch.randint(-(2**63), 2**63 - 1, (500,))]).to(device)
    eager = token_uniform(seed_tensor(seed, device), tokens)
    assert eager[: len(ids)].unique().numel() == len(ids)  # both halves of a number count
    assert torch.equal(eager.view(torch.int32), triton_uniform(seed_tensor(seed, device), tokens).view(torch.int32))


def test_strictly_inside() -> None:
    """The extreme words give numbers that are not rounded to 0 or 1, symmetric about one half."""
    words = torch.tensor([0, 511, 512, 2**32 - 1])
    uniform = ((words >> 9).float() + 0.5) * 2.0**-23
    assert uniform.tolist() == [2.0**-24, 2.0**-24, 3 * 2.0**-24, 1 - 2.0**-24]
    many = token_uniform(torch.tensor([5]), torch.arange(200_000))
    assert 0 < many.min() < 1e-4
    assert 1 - 1e-4 < many.max() < 1
    assert abs(many.mean().item() - 0.5) < 0.003  # 4.6 standard deviations
    assert abs(many.var().item() - 1 / 12) < 0.001


def test_consecutive_seeds_and_tokens_are_uncorrelated() -> None:
    tokens = torch.arange(50_000)
    rows = torch.stack([token_uniform(torch.tensor([seed]), tokens) for seed in range(3)])
    rows = torch.cat([rows, rows[:1].roll(1, 1)])
    correlation = torch.corrcoef(rows) - torch.eye(4)
    assert correlation.abs().max() < 0.02  # 4.5 standard deviations


def test_backends_draw_the_same_mask(device: str) -> None:
    logits = torch.randn(3, 129, 2, device=device)
    ids = torch.randperm(3 * 129, device=device).view(3, 129)
    for token_ids in (None, ids):
        masks = [sample_keep_mask(logits, seed=7, token_ids=token_ids, backend=name).keep_mask for name in BACKENDS]
        assert torch.equal(masks[0], masks[1])
        assert torch.equal(masks[0], masks[2])
    double = sample_keep_mask(logits.double(), seed=7, token_ids=ids)
    assert torch.equal(double.keep_mask, masks[0].double())


def test_seed_decides(backend: str, device: str) -> None:
    logits = torch.zeros(2, 64, 2, device=device)

    def draw(seed: int | Tensor | None) -> list[float]:
        return sample_keep_mask(logits, seed=seed, backend=backend).keep_mask.flatten().tolist()

    assert draw(3) == draw(3) == draw(seed_tensor(3, device))
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)
    torch.manual_seed(1)
    first = draw(None)
    torch.manual_seed(1)
    assert draw(None) == first  # PyTorch's generator draws the seed


def test_the_noise_follows_the_token(backend: str, device: str) -> None:
    """What a token draws does not change when compaction has moved it."""
    logits = torch.randn(2, 40, 2, device=device)
    numbers = torch.arange(80, device=device).view(2, 40)
    whole = sample_keep_mask(logits, seed=5, backend=backend)
    order = torch.stack([torch.randperm(40, device=device)[:17] for _ in range(2)])
    moved = sample_keep_mask(
        logits.gather(1, order[:, :, None].expand(-1, -1, 2)),
        seed=5,
        token_ids=numbers.gather(1, order),
        backend=backend,
    )
    assert torch.equal(moved.keep_mask, whole.keep_mask.gather(1, order))
    torch.testing.assert_close(moved.log_prob, whole.log_prob.gather(1, order), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_seeded_gradient_equals_that_of_its_uniform(name: str, device: str) -> None:
    """The backward draws the noise again."""
    logits = torch.randn(2, 63, 2, device=device, requires_grad=True)
    previous = torch.rand(2, 63, device=device) < 0.7
    ids = torch.randperm(126, device=device).view(2, 63)
    uniform = token_uniform(seed_tensor(11, device), ids)
    weights = torch.randn(3, 2, 63, device=device)
    results = []
    for noise in (dict(uniform=uniform), dict(seed=11, token_ids=ids)):
        out = sample_keep_mask(logits, tau=0.4, previous_mask=previous, backend=name, **noise)  # type: ignore[arg-type]
        total = torch.stack([(weight * part).sum() for weight, part in zip(weights, out, strict=True)]).sum()
        results.append((*out, torch.autograd.grad(total, logits)[0]))
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_fuzz_reevaluation(seed: int, device: str) -> None:
    """Bitwise what the sample returned, and close to the definition; ``seed`` reproduces a failure."""
    torch.manual_seed(seed)
    samples, tokens = int(torch.randint(1, 5, ())), int(torch.randint(1, 700, ()))
    logits = torch.randn(samples, tokens, 2, device=device) * 10.0 ** float(torch.randint(-2, 3, ()))
    previous = torch.rand(samples, tokens, device=device) < 0.8 if seed % 2 else None
    label = f"seed={seed} B={samples} N={tokens}"
    oracle = sample_keep_mask(logits.double(), seed=seed, previous_mask=previous, backend="reference")
    for name in ("eager", "triton"):
        out = sample_keep_mask(logits, seed=seed, previous_mask=previous, backend=name)
        log_prob, entropy = keep_mask_log_prob(logits, out.keep_mask, previous, backend=name)
        assert torch.equal(log_prob, out.log_prob), label
        assert torch.equal(entropy, out.entropy), label
        assert (out.keep_mask != oracle.keep_mask).sum() <= 1, label  # at most a margin within rounding of 0
        same = out.keep_mask == oracle.keep_mask
        torch.testing.assert_close(out.log_prob[same], oracle.log_prob[same].float(), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(out.entropy, oracle.entropy.float(), rtol=2e-6, atol=2e-6)
        for _ in range(3):
            again = sample_keep_mask(logits, seed=seed, previous_mask=previous, backend=name)
            assert all(torch.equal(left, right) for left, right in zip(out, again, strict=True)), label
