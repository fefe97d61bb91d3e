"""topk_compact on every implementation: hand cases, and the ranking in plain Python of the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from toprl_kernels import TopkCompactOutput, topk_compact
from toprl_kernels.topk.reference import best

BACKENDS = ["reference", "eager", "triton"]
NAN, INF = math.nan, math.inf


def run(
    scores: list[list[float]], k: int | list[int], backend: str, device: str = "cpu", **options
) -> TopkCompactOutput:
    table = torch.tensor(scores, dtype=options.pop("dtype", torch.float32), device=device)
    hidden = torch.arange(table.numel() * 3, dtype=torch.float32, device=device).view(*table.shape, 3)
    count = torch.tensor(k, device=device) if isinstance(k, list) else k
    return topk_compact(hidden, table, count, backend=backend, **options)


@pytest.mark.parametrize(
    ("scores", "k", "want"),
    [
        ([1.0, 3.0, 2.0], 2, [1, 2]),
        ([5.0] * 9, 4, [0, 1, 2, 3]),
        ([1.0, 2.0, 2.0, 2.0, 3.0], 3, [1, 2, 4]),
        ([-0.0, 0.0, -0.0, 0.0], 2, [0, 1]),
        ([0.0, -0.0, 1e-45, -1e-45], 2, [0, 2]),
        ([-1e-45, -0.0, 0.0, -1e-45], 3, [0, 1, 2]),
        ([NAN, -INF, 0.0, NAN], 2, [1, 2]),
        ([NAN, -INF, 0.0, NAN], 3, [0, 1, 2]),
        ([NAN, NAN, NAN], 2, [0, 1]),
        ([0.0, INF, 9.0, INF], 3, [1, 2, 3]),
        ([INF, 0.0, INF, INF], 2, [0, 2]),
        ([-3.0, -1.0, -2.0, -INF], 2, [1, 2]),
        ([3.4e38, INF, -3.4e38, 1.0], 2, [0, 1]),
        ([7.0], 1, [0]),
        ([7.0, 8.0], 2, [0, 1]),
    ],
)
def test_adversarial(scores: list[float], k: int, want: list[int], backend: str, device: str) -> None:
    out = run([scores], k, backend, device)
    assert out.indices.tolist() == [want]
    assert out.indices.dtype == torch.int64
    assert out.valid_mask.tolist() == [[True] * k]
    assert out.hidden_states[0, :, 0].tolist() == [3.0 * index for index in want]


def test_negative_nan_bits(backend: str, device: str) -> None:
    """NaN ranks last whatever its sign bit."""
    scores = torch.tensor([[-NAN, 1.0, NAN, -INF]], device=device)
    scores[0, 0] = torch.tensor(-4194304, dtype=torch.int32).view(torch.float32)  # 0xFFC00000
    out = topk_compact(torch.zeros(1, 4, 1, device=device), scores, 2, backend=backend)
    assert out.indices.tolist() == [[1, 3]]


def test_a_nan_row_beside_a_row_of_ties(backend: str, device: str) -> None:
    """Counting what reaches the K-th number finds the right total here: none of the first row, all of the second."""
    out = run([[NAN, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0]], 2, backend, device)
    assert out.indices.tolist() == [[2, 3], [0, 1]]


VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, NAN, INF, -INF, 1e-45, -1e-45, 3.4e38, -3.4e38])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("name", BACKENDS)
def test_against_python(name: str, data: st.DataObject) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    samples, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    scores = data.draw(st.lists(st.lists(VALUES, min_size=tokens, max_size=tokens), min_size=samples, max_size=samples))
    ragged = data.draw(st.lists(st.integers(0, tokens), min_size=samples, max_size=samples))
    uniform = data.draw(st.booleans())
    valid = None
    if data.draw(st.booleans()):
        valid = data.draw(
            st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=samples, max_size=samples)
        )
    counts = [ragged[0]] * samples if uniform else ragged
    out = run(
        scores, ragged[0] if uniform else ragged, name, device,
        valid_mask=None if valid is None else torch.tensor(valid, device=device),
    )  # fmt: skip
    length = max(counts)
    for sample in range(samples):
        eligible = [i for i in range(tokens) if valid is None or valid[sample][i]]
        want = best(scores[sample], eligible, counts[sample])
        padding = length - len(want)
        assert out.indices[sample].tolist() == want + [-1] * padding
        assert out.valid_mask[sample].tolist() == [True] * len(want) + [False] * padding
        assert bool((out.hidden_states[sample, len(want) :] == 0).all())


@pytest.mark.parametrize("name", ["reference", "eager"])
def test_float64_scores_keep_all_their_digits(name: str) -> None:
    out = run([[1.0, 1.0 + 1e-15, 1.0 - 1e-15, NAN]], 2, name, dtype=torch.float64)
    assert out.indices.tolist() == [[0, 1]]


def test_position_ids(backend: str, device: str) -> None:
    scores = [[0.0, 2.0, 1.0, 3.0], [4.0, 0.0, 0.0, 9.0]]
    flat = torch.arange(8, device=device).view(2, 4) + 100
    assert run(scores, 2, backend, device, position_ids=flat).position_ids.tolist() == [[101, 103], [104, 107]]  # type: ignore[union-attr]
    rope = torch.stack([flat, flat + 100, flat + 200]).to(torch.int32)
    out = run(scores, [1, 2], backend, device, position_ids=rope)
    assert out.position_ids is not None
    assert out.position_ids.dtype == torch.int32
    assert out.position_ids.tolist() == [[[103, 0], [104, 107]], [[203, 0], [204, 207]], [[303, 0], [304, 307]]]
    assert run(scores, 2, backend, device).position_ids is None


def test_ragged_k_is_clipped_unless_validated(backend: str, device: str) -> None:
    assert run([[1.0, 2.0], [3.0, 4.0]], [-3, 9], backend, device).indices.tolist() == [[-1, -1], [0, 1]]
    with pytest.raises(ValueError, match=r"k=\[-3, 9\] has values outside 0..N=2.*clamp"):
        run([[1.0, 2.0], [3.0, 4.0]], [-3, 9], backend, device, validate=True)


def test_max_length(backend: str, device: str) -> None:
    """The output length is the caller's; a larger k keeps the best that fit."""
    scores = [[3.0, 1.0, 2.0, 0.0], [1.0, 2.0, 3.0, 4.0]]
    out = run(scores, [1, 2], backend, device, max_length=3)
    assert out.indices.tolist() == [[0, -1, -1], [2, 3, -1]]
    assert run(scores, [1, 4], backend, device, max_length=2).indices.tolist() == [[0, -1], [2, 3]]
    assert run(scores, [1, 4], backend, device, max_length=0).hidden_states.shape == (2, 0, 3)


def test_left_padding(backend: str, device: str) -> None:
    scores, rope = [[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]], torch.arange(18, device=device).view(3, 2, 3) + 1
    out = run(scores, [1, 3], backend, device, padding_side="left", position_ids=rope, return_inverse=True)
    assert out.indices.tolist() == [[-1, -1, 0], [0, 1, 2]]
    assert out.valid_mask.tolist() == [[False, False, True], [True] * 3]
    assert out.hidden_states[0, :, 1].tolist() == [0.0, 0.0, 1.0]
    assert out.position_ids is not None and out.inverse is not None
    assert out.position_ids.tolist() == [[[0, 0, r], [r + 3, r + 4, r + 5]] for r in (1, 7, 13)]
    assert out.inverse.tolist() == [[2, -1, -1], [0, 1, 2]]
    valid = torch.tensor([[True, False, True], [False, False, True]], device=device)
    by_validity = run(scores, 2, backend, device, padding_side="left", valid_mask=valid)
    assert by_validity.indices.tolist() == [[0, 2], [-1, 2]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_inverse_scatters_back(side: str, backend: str, device: str) -> None:
    scores = torch.randn(3, 20, device=device)
    hidden = torch.randn(3, 20, 4, device=device)
    k = torch.tensor([0, 7, 20], device=device)
    out = topk_compact(hidden, scores, k, return_inverse=True, padding_side=side, backend=backend)
    assert out.inverse is not None
    assert out.inverse.dtype == torch.int64
    back = out.hidden_states.gather(1, out.inverse.clamp(min=0)[:, :, None].expand(-1, -1, 4))
    kept = (out.inverse >= 0)[:, :, None]
    assert kept.sum().item() == 27
    assert torch.equal(back * kept, hidden * kept)
    assert run([[1.0, 2.0]], 1, backend, device).inverse is None
    assert run([[1.0, 2.0]], 0, backend, device, return_inverse=True).inverse.tolist() == [[-1, -1]]  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_hidden_states_of_any_dtype(dtype: torch.dtype, backend: str, device: str) -> None:
    hidden = (torch.randn(2, 9, 5, device=device) * 3).to(dtype)
    out = topk_compact(hidden, torch.randn(2, 9, device=device), torch.tensor([4, 2]), backend=backend)
    assert out.hidden_states.dtype == dtype
    for sample, count in enumerate((4, 2)):
        kept, want = out.hidden_states[sample].float(), hidden.float()[sample, out.indices[sample, :count]]
        assert torch.equal(kept[:count], want)
        assert not kept[count:].any()


def test_threshold(backend: str, device: str) -> None:
    """Every token that reaches it, up to k; NaN does not, and it is rounded as the scores are."""
    scores = [[0.7, NAN, 0.9, 0.1, INF, 0.7], [0.1, 0.2, 0.3, 0.4, 0.5, -INF]]
    out = run(scores, 3, backend, device, threshold=0.7)
    assert out.indices.tolist() == [[0, 2, 4], [-1, -1, -1]]
    valid = torch.tensor([[True] * 4 + [False] * 2] * 2, device=device)
    out = run(scores, [6, 2], backend, device, threshold=0.2, valid_mask=valid, padding_side="left")
    assert out.indices.tolist() == [[-1] * 4 + [0, 2], [-1] * 4 + [2, 3]]


def test_segments(backend: str, device: str) -> None:
    """The best of each, in the order of the sample; a segment without a quota is dropped."""
    segments = torch.tensor([[0, 1, 0, 1, 7, 0], [1, 1, 1, -1, 0, 0]], device=device)
    scores = [[1.0, 5.0, 2.0, 6.0, 9.0, 2.0], [4.0, NAN, 4.0, 9.0, 1.0, 2.0]]
    out = run(scores, [[2, 1], [1, 2]], backend, device, segments=segments, return_inverse=True)
    assert out.indices.tolist() == [[2, 3, 5], [0, 2, 5]]
    assert out.inverse is not None
    assert out.inverse.tolist() == [[-1, -1, 0, 1, -1, 2], [0, -1, 1, -1, -1, 2]]
    out = run(scores, [[9, 0], [0, 3]], backend, device, segments=segments, padding_side="left", max_length=4)
    assert out.indices.tolist() == [[-1, 0, 2, 5], [-1, 0, 1, 2]]
    out = run(scores, [[2, 1], [1, 2]], backend, device, segments=segments, max_length=2)  # the first of those selected
    assert out.indices.tolist() == [[2, 3], [0, 2]]


def test_cu_seqlens(backend: str, device: str) -> None:
    """Sequences of any length follow one another, in the input and in the output."""
    scores = torch.tensor([1.0, 2.0, 9.0, 3.0, 4.0, 4.0, 5.0], device=device)
    hidden = torch.arange(14.0, device=device).view(7, 2).requires_grad_()
    bounds = torch.tensor([0, 2, 2, 3, 7], dtype=torch.int32, device=device)
    positions = torch.arange(21, device=device).view(3, 7)
    out = topk_compact(hidden, scores, 2, cu_seqlens=bounds, position_ids=positions, backend=backend)
    assert out.indices.tolist() == [0, 1, 2, 4, 6, -1, -1]
    assert out.cu_seqlens is not None and out.position_ids is not None
    assert (out.cu_seqlens.dtype, out.cu_seqlens.tolist()) == (torch.int32, [0, 2, 2, 3, 5])
    assert out.position_ids[1].tolist() == [7, 8, 9, 11, 13, 0, 0]
    assert out.hidden_states[:, 0].tolist() == [0, 2, 4, 8, 12, 0, 0]
    (gradient,) = torch.autograd.grad(out.hidden_states.sum(), hidden)
    assert gradient[:, 0].tolist() == [1, 1, 1, 0, 1, 0, 1]
    k = torch.tensor([1, 3, 0, 3], device=device)
    out = topk_compact(hidden, scores, k, cu_seqlens=bounds, max_length=4, return_inverse=True, backend=backend)
    assert out.inverse is not None and out.cu_seqlens is not None
    assert out.indices.tolist() == [1, 4, 5, 6]
    assert (out.inverse.tolist(), out.cu_seqlens.tolist()) == ([-1, 0, -1, -1, 1, 2, 3], [0, 1, 1, 1, 4])
    out = topk_compact(hidden, scores, k, cu_seqlens=bounds, backend=backend)
    assert out.indices.tolist() == [1, 4, 5, 6, -1, -1, -1]


def test_zero_k_and_empty_batch(backend: str, device: str) -> None:
    out = run([[1.0, 2.0]], 0, backend, device)
    assert out.hidden_states.shape == (1, 0, 3)
    assert out.indices.shape == (1, 0)
    hidden = torch.zeros(0, 5, 3, device=device, requires_grad=True)
    positions = torch.zeros(3, 0, 5, dtype=torch.int64, device=device)
    empty = topk_compact(hidden, torch.zeros(0, 5, device=device), 2, position_ids=positions, backend=backend)
    assert empty.hidden_states.shape == (0, 2, 3)
    assert empty.position_ids is not None
    assert empty.position_ids.shape == (3, 0, 2)
    empty.hidden_states.sum().backward()
    none = torch.zeros(2, 0, 3, device=device)
    assert topk_compact(none, none[..., 0], 0, backend=backend).indices.shape == (2, 0)


def test_non_contiguous(backend: str, device: str) -> None:
    hidden = torch.randn(7, 2, 6, device=device).transpose(0, 1)[..., ::2]
    scores = torch.randn(2, 14, device=device)[:, ::2]
    positions = torch.arange(14, device=device).view(7, 2).T
    valid = torch.ones(2, 14, dtype=torch.bool, device=device)[:, ::2]
    plain = topk_compact(
        hidden.contiguous(), scores.contiguous(), 3, position_ids=positions.contiguous(), backend="reference"
    )
    out = topk_compact(hidden, scores, 3, position_ids=positions, valid_mask=valid, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(out, plain, strict=True) if a is not None)  # type: ignore[arg-type]


def test_validate_accepts_good_input() -> None:
    scores: Tensor = torch.tensor([[INF, 0.0, -INF], [1.0, 2.0, NAN]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    out = topk_compact(torch.zeros(2, 3, 1), scores, torch.tensor([1, 2]), valid_mask=valid, validate=True)
    assert out.indices.tolist() == [[0, -1], [0, 1]]
