"""The masked attention kernels against the definition in float64, within the error budget, on poisoned memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from toprl_kernels import configs
from toprl_kernels.attention import triton as launch
from toprl_kernels.attention.reference import AttentionCall, masked_attention_reference
from toprl_kernels.configs import LaunchConfig as C
from toprl_kernels.testing import assert_within_budget, make_attention_inputs, max_error

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
NAMES = ["output", "grad_query", "grad_key", "grad_value", "grad_keep_mask"]
# many blocks and unequal sides even at short lengths
SMALL = {
    "masked_attention_fwd": C(16, 32, 4, 1),
    "masked_attention_fwd_compact": C(16, 32, 4, 1),
    "masked_attention_decode": C(16, 16, 4, 1),
    "masked_attention_bwd_prepare": C(64, 0, 4, 1),
    "masked_attention_bwd_dkdv": C(16, 32, 4, 1),
    "masked_attention_bwd_dq": C(32, 16, 4, 1),
    "masked_attention_bwd_dq_compact": C(32, 16, 4, 1),
}
COMPACT = {"masked_attention_compact": C(0, 32, 4, 1)}


class Case(NamedTuple):
    """Arguments of the launches. ``causal`` and ``ranges`` exclude each other."""

    query: Tensor
    key: Tensor
    value: Tensor
    keep_mask: Tensor
    padding: Tensor | None
    grad_output: Tensor
    causal: bool = False
    ranges: Tensor | None = None
    scale: float = 0.25

    def call(self, lists: Tensor | None = None) -> AttentionCall:
        masks = self.keep_mask, self.padding, self.ranges, lists
        return AttentionCall(self.query, self.key, self.value, *masks, self.causal, self.scale)

    def allowed(self) -> Tensor:
        """Pairs (row, key) whose key is in the row's range and that are not padding, [B, Nq, N]."""
        batch, num_keys = self.keep_mask.shape
        tokens = torch.arange(num_keys, device=self.query.device)
        if self.ranges is not None:
            allowed = (tokens >= self.ranges[..., :1]) & (tokens < self.ranges[..., 1:])
        elif self.causal:
            allowed = (tokens <= tokens[:, None]).expand(batch, -1, -1)
        else:
            allowed = torch.ones(batch, num_keys, num_keys, dtype=torch.bool, device=self.query.device)
        if self.padding is not None:
            allowed = allowed & self.padding[:, None] & self.padding[:, :, None]
        return allowed[:, num_keys - self.query.shape[2] :]


def windows(batch: int, num_keys: int, width: int = 12) -> Tensor:
    """Ranges with everything that they are for: sliding windows, then blocks that see both ways, packed sequences."""
    tokens = torch.arange(num_keys)
    image = (tokens // 20 * 20 + 10).clamp(max=num_keys)
    ends = torch.where((tokens % 20 < 10) & (tokens > 20), image, tokens + 1)
    window = torch.stack([(tokens - width).clamp(min=0), ends], dim=-1)
    cut = num_keys // 3
    packed = torch.stack([torch.where(tokens < cut, 0, cut), torch.where(tokens < cut, cut, num_keys)], dim=-1)
    return torch.stack([window if sample % 2 == 0 else packed for sample in range(batch)]).to(torch.int32)


def make(
    batch: int, heads: int, kv_heads: int, num_queries: int, num_keys: int, head_dim: int, mode: str = "causal",
    *, value_dim: int | None = None, scale: float | None = None, device: str = "cpu", **arguments: Any,
) -> Case:  # fmt: skip
    x = make_attention_inputs(batch, heads, kv_heads, num_queries, num_keys, head_dim, **arguments)
    y = make_attention_inputs(batch, heads, kv_heads, num_queries, num_keys, value_dim or head_dim, **arguments)
    ranges = windows(batch, num_keys) if mode == "ranges" else None
    case = Case(
        x.query, x.key, y.value, x.keep_mask, x.key_padding_mask, y.grad_output, mode == "causal", ranges,
        head_dim**-0.5 if scale is None else scale,
    )  # fmt: skip
    on_device: list[Any] = [each.to(device) if isinstance(each, Tensor) else each for each in case]
    return Case(*on_device)


def run(case: Case, bounded: bool = False, needs: tuple[bool, ...] | None = None, lists: bool = True) -> list[Any]:
    """Output and gradients of the kernels (that of the mask only for a float mask)."""
    made = launch.make_lists(case.keep_mask, case.padding, case.ranges) if lists else None
    call = case.call(made)
    output, lse = launch.masked_attention_forward_triton(call)
    wanted = [True, True, True, case.keep_mask.is_floating_point()] if needs is None else list(needs)
    gradients = launch.masked_attention_backward_triton(case.grad_output, output, lse, call, bounded, wanted)
    return [output, *(gradient for gradient, needed in zip(gradients, wanted, strict=True) if needed)]


def definition(case: Case, dtype: torch.dtype, bounded: bool = False) -> list[Tensor]:
    """Eqs. 6-7 over all pairs and autograd."""
    leaves = [tensor.to(dtype).clone().requires_grad_() for tensor in (case.query, case.key, case.value)]
    if case.keep_mask.is_floating_point():
        leaves.append(case.keep_mask.to(torch.promote_types(dtype, torch.float32)).clone().requires_grad_())
    call = AttentionCall(*leaves, *case.call()[len(leaves) :])
    output = masked_attention_reference(call, bounded)[0]
    return [output.detach(), *torch.autograd.grad(output, leaves, case.grad_output.to(dtype))]


def check(case: Case) -> list[Tensor]:
    got, oracle, plain = run(case), definition(case, torch.float64), definition(case, case.query.dtype)
    atol = 20 * torch.finfo(case.query.dtype).eps if case.key.shape[2] == 1 else 0.0  # true gradients of 0
    for name, ours, want, eager in zip(NAMES, got, oracle, plain, strict=False):
        assert_within_budget(ours, eager, want, name=name, atol=atol, dtype=case.query.dtype)
    return got


# batch, heads, key/value heads, queries, keys, head dim, mode
LANE = [
    ((1, 1, 1, 1, 1, 64, "full"), dict(mask="hard")),
    ((1, 8, 1, 1, 1, 96, "causal"), dict(dtype=torch.bfloat16)),
    ((1, 4, 1, 15, 15, 80, "causal"), dict(padding=True)),
    ((1, 7, 1, 15, 15, 128, "full"), dict(mask="hard", dtype=torch.float16)),
    ((2, 2, 1, 33, 70, 24, "causal"), dict(mask="hard", padding=True)),
    ((2, 2, 2, 70, 70, 16, "ranges"), dict(padding=True)),
    ((2, 4, 2, 30, 70, 16, "ranges"), dict(mask="hard")),
    ((1, 3, 1, 40, 63, 40, "full"), dict(mask="soft", padding=True)),
    ((1, 2, 1, 63, 63, 16, "causal"), dict(mask="soft", dtype=torch.float16)),
    ((1, 2, 1, 37, 37, 16, "causal"), dict(value_dim=40)),
    ((1, 2, 2, 37, 37, 48, "ranges"), dict(value_dim=16, mask="hard")),
    ((1, 2, 1, 37, 37, 16, "causal"), dict(scale=-0.3)),
    ((1, 2, 1, 37, 37, 16, "full"), dict(scale=0.0)),
]


@pytest.mark.parametrize(("sizes", "arguments"), LANE, ids=str)
def test_lane(sizes: tuple[Any, ...], arguments: dict[str, Any], device: str) -> None:
    with configs.override(SMALL):
        check(make(*sizes, device=device, **arguments))


PINNED = [
    ((1, 2, 1, 129, 129, 128, "causal"), dict(dtype=torch.bfloat16)),
    ((1, 1, 1, 300, 300, 64, "causal"), dict(mask="hard", dtype=torch.float16)),
    ((1, 1, 1, 300, 300, 64, "causal"), dict(mask="mixed", padding=True, dtype=torch.float16)),
    ((1, 1, 1, 40, 150, 80, "ranges"), dict(dtype=torch.bfloat16, padding=True)),
    ((1, 1, 1, 60, 60, 200, "causal"), dict(dtype=torch.float16)),  # dV and dK in two launches
    ((1, 1, 1, 20, 33, 512, "full"), dict()),
    ((2, 2, 1, 20, 33, 3, "causal"), dict()),
]


@pytest.mark.parametrize(("sizes", "arguments"), PINNED, ids=str)
def test_with_pinned_configurations(sizes: tuple[Any, ...], arguments: dict[str, Any], device: str) -> None:
    with configs.override(COMPACT if arguments.get("padding") else {}):
        check(make(*sizes, device=device, **arguments))


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["full", "causal", "ranges"])
@pytest.mark.parametrize("mask", ["hard", "soft", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("groups", [1, 4, 7, 8])
@pytest.mark.parametrize("length", [1, 15, 63, 127, 129, 577])
def test_every_combination(
    length: int, groups: int, head_dim: int, dtype: torch.dtype, mask: str, mode: str, device: str
) -> None:
    sizes = (1, groups, 1, length, length, head_dim, mode)
    check(make(*sizes, mask=mask, padding=length % 2 == 1, dtype=dtype, seed=length, device=device))


# --- invisible means invisible ---

# token, which of its tensors are bad ("q" "k" "v" "g"), whether its grad_output is 0; each is a sample of the batch
POISON = {
    "dropped": (3, "qkv", True),
    "padding": (7, "qkvg", False),
    "later": (-1, "qkv", True),
    "dead row": (11, "q", True),
    "live row": (5, "qg", False),
    "kept key": (9, "kv", False),
}


@pytest.mark.parametrize(
    ("num_keys", "mode", "mask", "bad", "pinned"),
    [
        (40, "full", "mixed", torch.inf, {}),
        (40, "causal", "hard", torch.nan, COMPACT),
        (40, "ranges", "mixed", torch.nan, COMPACT),
        (50, "causal", "mixed", torch.nan, {}),
    ],
    ids=str,
)
def test_invisible_means_invisible(
    num_keys: int, mode: str, mask: str, bad: float, pinned: dict[str, C], device: str
) -> None:
    """Whatever stands in a token, those that do not see it have bitwise the results of clean inputs; others are NaN."""
    case = make(len(POISON), 1, 1, num_keys, num_keys, 16, mode, mask=mask, device=device)
    tensors = dict(q=case.query, k=case.key, v=case.value, g=case.grad_output)
    valid = torch.ones(len(POISON), num_keys, dtype=torch.bool, device=device)
    is_bad = {name: torch.zeros_like(valid) for name in "qkvg"}
    for sample, (what, (token, names, is_dead)) in enumerate(POISON.items()):
        case.keep_mask[sample, token] = what != "dropped"
        valid[sample, token] = what != "padding"
        for name in names:
            is_bad[name][sample, token] = True
        if is_dead:
            case.grad_output[sample, :, token] = 0.0
    case = case._replace(padding=valid)
    poisoned = {
        name: tensor.masked_fill(is_bad[name][:, None, :, None], bad) if name != "g" or bad != bad else tensor
        for name, tensor in tensors.items()
    }
    dirty = case._replace(query=poisoned["q"], key=poisoned["k"], value=poisoned["v"], grad_output=poisoned["g"])
    with configs.override(SMALL | pinned):
        clean_results, results = run(case), run(dirty)

    in_range = case.allowed()
    visible = in_range & ((case.keep_mask > 0)[:, None] | torch.eye(num_keys, dtype=torch.bool, device=device))
    bad_rows = (visible & (is_bad["k"] | is_bad["v"])[:, None]).any(-1) | is_bad["q"] & valid
    live = valid & (case.grad_output != 0).any(-1).any(1)
    bad_live = live & (bad_rows | is_bad["g"])
    bad_keys = is_bad["k"] | is_bad["v"]
    reached = [
        bad_rows,
        bad_rows | is_bad["g"] & valid,
        (visible & bad_live[:, :, None]).any(1) | bad_keys,
        (visible & bad_live[:, :, None]).any(1) | bad_keys,
        (in_range & bad_live[:, :, None]).any(1) | bad_keys,
    ]
    for name, clean, ours, reach in zip(NAMES, clean_results, results, reached, strict=False):
        rows = ours if ours.ndim == 2 else ours.transpose(1, 2)
        clean = clean if clean.ndim == 2 else clean.transpose(1, 2)
        assert torch.equal(rows[~reach], clean[~reach]), name
        assert bool(clean.isfinite().all()), name
    if bad != bad:  # an infinite score may also mean a weight of 0 or of 1
        assert bool(results[0].transpose(1, 2)[bad_rows].isnan().all())


# --- ways of computing the same ---


@pytest.mark.parametrize(("mask", "mode"), [("hard", "causal"), ("mixed", "ranges")])
def test_compacted_keys_change_nothing(mask: str, mode: str, device: str) -> None:
    case = make(2, 2, 1, 34, 50, 24, mode, mask=mask, padding=True, device=device)
    with configs.override(SMALL):
        through_list = run(case)
        with configs.override(COMPACT):
            gathered = run(case)
    assert all(torch.equal(left, right) for left, right in zip(through_list, gathered, strict=True))


@pytest.mark.parametrize("mask", ["hard", "mixed"])
def test_programs_that_share_a_key_block(mask: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few multiprocessors: no program shares. Some: those of dropped keys help. Many: more programs than blocks."""
    case = make(1, 2, 1, 40, 40, 16, mask=mask, device=device)
    results = []
    for count in (1, 2, 16):  # 2 blocks of keys
        monkeypatch.setattr(configs, "multiprocessors", lambda device, count=count: count)
        with configs.override(SMALL | {"masked_attention_bwd_dkdv": C(32, 32, 4, 1)}):
            results.append(check(case))
            again = run(case)
    assert all(torch.equal(a, b) for a, b in zip(results[-1], again, strict=True))
    assert not torch.equal(results[0][2], results[2][2])  # another order of summation: the heads were divided


@pytest.mark.parametrize(
    ("sizes", "arguments", "count"),
    [
        ((2, 4, 2, 1, 70, 16, "causal"), dict(mask="hard"), 40),
        ((1, 4, 1, 4, 70, 24, "causal"), dict(padding=True, value_dim=40), 40),
        ((1, 4, 1, 4, 70, 24, "causal"), dict(padding=True, value_dim=40), 1),
        ((2, 1, 1, 5, 70, 16, "ranges"), dict(), 40),
        ((1, 16, 1, 1, 40, 16, "full"), dict(mask="soft", dtype=torch.bfloat16), 1),
    ],
    ids=str,
)
def test_decoding(
    sizes: tuple[Any, ...], arguments: dict[str, Any], count: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "multiprocessors", lambda device: count)
    with configs.override(SMALL):
        check(make(*sizes, device=device, **arguments))


def test_decoding_sees_nothing_invisible(device: str) -> None:
    case = make(2, 2, 1, 4, 50, 16, padding=True, device=device)
    hidden = case.keep_mask == 0
    hidden[:, -4:] = False
    hidden[:, -1] = True  # causally later than all rows but its own
    key, value = (tensor.masked_fill(hidden[:, None, :, None], torch.nan) for tensor in (case.key, case.value))
    with configs.override(SMALL):
        clean, dirty = run(case)[0], run(case._replace(key=key, value=value))[0]
    assert torch.equal(dirty[:, :, :-1], clean[:, :, :-1])
    assert case.padding is not None
    assert bool(dirty[:, :, -1][case.padding[:, -1]].isnan().all())


@pytest.mark.parametrize("mask_value", [0.0, 1.0, 1e-30])
def test_constant_masks(mask_value: float, device: str) -> None:
    case = make(1, 2, 2, 34, 34, 16, "full", device=device)
    with configs.override(SMALL):
        check(case._replace(keep_mask=torch.full_like(case.keep_mask, mask_value)))
        hard = torch.full_like(case.keep_mask, mask_value) > 0.5
        output = check(case._replace(keep_mask=hard, causal=True))[0]
    if not hard.any():
        assert torch.equal(output, case.value)


@pytest.mark.parametrize("magnitude", [40, 1000])
def test_extreme_logits(magnitude: float, device: str) -> None:
    """Up to +-1e3 and more. A softmax that subtracts the maximum over all keys, dropped ones too, is NaN here."""
    case = make(1, 2, 2, 34, 34, 16, device=device)
    case = case._replace(query=case.query * magnitude)
    with configs.override(SMALL):
        got = run(case)
    assert all(bool(tensor.isfinite().all()) for tensor in got)
    assert_within_budget(got[0], definition(case, torch.float32)[0], definition(case, torch.float64)[0], name="output")


def test_strides_and_expanded_gradients(device: str) -> None:
    case = make(2, 2, 1, 21, 37, 24, mask="mixed", padding=True, device=device)
    odd = torch.randn(2, 37, 1, 27, device=device)[..., 1:25].transpose(1, 2)  # neither aligned nor a multiple of 16
    odd.copy_(case.value)
    case = case._replace(grad_output=torch.ones_like(case.grad_output))
    views = case._replace(
        query=case.query.transpose(1, 2).contiguous().transpose(1, 2),  # [B, N, H, D] storage, as models have it
        key=case.key.transpose(2, 3).contiguous().transpose(2, 3),  # head dimension not dense
        value=odd,
        keep_mask=case.keep_mask.repeat_interleave(2, dim=1)[:, ::2],
        padding=None if case.padding is None else case.padding.repeat_interleave(2, dim=1)[:, ::2],
        grad_output=torch.ones((), device=device).expand(case.grad_output.shape),
    )
    with configs.override(SMALL):
        got, want = run(views), check(case)
    assert got[0].stride() == views.query.stride()  # laid out like the query
    assert all(torch.equal(left, right) for left, right in zip(got, want, strict=True))


@pytest.mark.parametrize("mask", ["hard", "mixed"])
def test_only_requested_gradients(mask: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gradient alone is the one of all together, and nothing is launched for the others."""
    case = make(1, 2, 2, 20, 20, 16, mask=mask, device=device)
    launched: list[str] = []

    class Spy:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append(self.name)
            assert len(grid) == 1  # the other dimensions end at 65,535 programs
            return self.kernel[grid]

    with configs.override(SMALL):
        full = run(case)
        for name in dir(launch):
            if name.startswith("masked_attention_") and name.endswith("_kernel"):
                monkeypatch.setattr(launch, name, Spy(name[17:-7], getattr(launch, name)))
        for position in range(len(full) - 1):
            launched.clear()
            _, gradient = run(case, needs=tuple(each == position for each in range(4)), lists=False)
            gradients = ["bwd_dq"] if position == 0 else ["bwd_dkdv", "bwd_finish"]
            if position == 3:  # every key block has work
                del gradients[1]
            assert launched == ["lists", "fwd", "lists", "bwd_prepare", *gradients]
            torch.testing.assert_close(gradient, full[position + 1], rtol=1e-5, atol=1e-6)
        launched.clear()
        run(case)
    assert launched.count("lists") == 1


def test_many_heads_are_one_grid_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    """B x H beyond 65,535, which the second and third dimension of a grid cannot have."""
    grids: list[tuple[int, ...]] = []

    class Record:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in ("lists", "fwd", "decode", "merge"):
        monkeypatch.setattr(launch, f"masked_attention_{name}_kernel", Record())
    for num_tokens in (1, 17):  # decoding and not
        query = torch.zeros(1, 70_000, num_tokens, 16)
        keep_mask = torch.ones(1, num_tokens, dtype=torch.bool)
        launch.masked_attention_forward_triton(Case(query, query, query, keep_mask, None, query, True).call())
    assert grids == [(1,), (70_000,), (70_000,), (1,), (70_000,)]


def test_bounded_mask_gradient(device: str) -> None:
    """R / (1 + R) where m = 0, exact where m > 0, nothing else changes."""
    case = make(1, 4, 2, 37, 37, 16, padding=True, device=device)
    case = case._replace(query=case.query * 4)
    with configs.override(SMALL):
        got, exact = run(case, bounded=True), run(case)
    want = definition(case, torch.float64, bounded=True)[4].float()
    torch.testing.assert_close(got[4], want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    assert all(torch.equal(a, b) for a, b in zip(got[:4], exact[:4], strict=True))
    kept = case.keep_mask > 0
    torch.testing.assert_close(got[4][kept], exact[4][kept])
    assert float(got[4].abs().max()) < 0.5 * float(exact[4].abs().max())


def test_log_sum_exp_is_natural(device: str) -> None:
    case = make(1, 2, 1, 20, 20, 16, mask="hard", padding=True, device=device)
    _, lse = launch.masked_attention_forward_triton(case.call())
    groups = case.query.shape[1] // case.key.shape[1]
    scores = case.scale * (case.query @ case.key.repeat_interleave(groups, dim=1).transpose(-1, -2))
    seen = case.allowed() & (case.keep_mask[:, None] | torch.eye(20, dtype=torch.bool, device=device))
    want = scores.masked_fill(~seen[:, None], -torch.inf).logsumexp(dim=-1)
    torch.testing.assert_close(lse, want.masked_fill(want == -torch.inf, torch.inf))


def test_fuzz(device: str) -> None:
    """Random sizes; the seed in the failing assertion reproduces the case."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int, generator: torch.Generator = generator) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        num_keys, kv_heads = draw(1, 50), draw(1, 2)
        case = make(
            draw(1, 2), kv_heads * draw(1, 2), kv_heads, draw(1, num_keys), num_keys, draw(1, 40),
            ["full", "causal", "ranges"][draw(0, 2)], value_dim=draw(1, 40), mask=["hard", "soft", "mixed"][draw(0, 2)],
            padding=bool(draw(0, 1)), seed=seed, device=device,
        )  # fmt: skip
        with configs.override(SMALL | (COMPACT if draw(0, 1) else {})):
            for name, left, right in zip(NAMES, run(case), definition(case, torch.float64), strict=False):
                error = max_error(left, right) / max(float(right.abs().max()), 1.0)
                assert error < 1e-5, f"seed {seed}: {name} is off by {error}"
