"""Time launch configurations on the GPU at hand and remember the best: opt-in, nothing runs it for you.

    python bench/tune.py                       # everything, some minutes
    python bench/tune.py --kernel actor_score  # one kernel or op; the other rows of the file stay
    python bench/tune.py --sweep 8192 --csv sweep.csv  # attention of that many tokens, D = 128: remembers nothing

Two things are measured: candidates for the block sizes of the matrix kernels, and actor_score's fused kernels against
its eager path. The result is a JSON file that :func:`toprl_kernels.configs.select` reads from then on
(~/.cache/toprl_kernels/<architecture>-<triton version>.json; the environment variable TOPRL_KERNELS_CONFIGS names
another). Delete it to go back to the pinned table.

A candidate that does not fit the GPU is passed over. A candidate that computes something else than the pinned
configuration aborts the run: being slow must not hide it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that ``bench`` is found when this file is a script

from bench.common import Row, dtype_name, milliseconds, read_csv, write_csv
from toprl_kernels import actor_score, configs, masked_attention
from toprl_kernels.configs import Bucket, LaunchConfig, Measurements, Times
from toprl_kernels.testing import make_actor_weights, make_attention_inputs

C = LaunchConfig
Timer = Callable[[Callable[[], object]], float]  # milliseconds of one call

# Two stages more than tiles in flight: the load of the list of keys takes one. Eight warps need 128 rows, four 64: with
# fewer both halves of the warps compute the same rows (bench/compile_report.py). Small blocks are for float32.
CANDIDATES: dict[str, list[LaunchConfig]] = {
    "masked_attention_fwd": [
        C(128, 64, 8, 3), C(128, 64, 8, 5), C(128, 64, 8, 6), C(128, 128, 8, 5), C(128, 128, 8, 2), C(128, 64, 8, 2),
        C(128, 32, 8, 3), C(128, 32, 8, 5), C(64, 64, 4, 3), C(64, 64, 4, 5), C(64, 64, 8, 2), C(64, 32, 4, 2),
        C(32, 32, 8, 1), C(16, 16, 8, 1),
    ],
    "masked_attention_fwd_compact": [
        C(128, 128, 8, 3), C(128, 64, 8, 3), C(128, 64, 8, 4), C(64, 64, 8, 2), C(32, 32, 8, 1), C(16, 16, 8, 2),
    ],
    "masked_attention_decode": [
        C(16, 64, 4, 5), C(16, 64, 4, 3), C(16, 128, 4, 3), C(16, 32, 4, 3), C(16, 32, 8, 1), C(16, 16, 8, 2),
    ],
    "masked_attention_bwd_prepare": [C(16, 0, 4, 1), C(32, 0, 4, 1), C(32, 0, 8, 1), C(64, 0, 8, 1)],
    "masked_attention_bwd_dkdv": [
        C(32, 64, 8, 2), C(32, 128, 8, 2), C(64, 128, 8, 2), C(64, 128, 8, 1), C(32, 64, 4, 2), C(64, 64, 4, 2),
        C(64, 64, 8, 2), C(32, 128, 8, 3), C(64, 32, 8, 1), C(32, 32, 8, 1), C(32, 32, 4, 2), C(16, 16, 8, 1),
    ],
    "masked_attention_bwd_dq": [
        C(128, 64, 8, 3), C(128, 64, 8, 5), C(128, 64, 8, 2), C(128, 32, 8, 2), C(128, 32, 8, 3), C(128, 32, 8, 5),
        C(64, 64, 4, 3), C(64, 64, 4, 5), C(64, 32, 8, 2), C(64, 32, 4, 2), C(32, 32, 8, 1), C(16, 16, 8, 1),
    ],
    "masked_attention_bwd_dq_compact": [
        C(128, 64, 8, 3), C(128, 64, 8, 4), C(128, 32, 8, 3), C(64, 64, 8, 2), C(32, 32, 8, 1), C(16, 16, 8, 2),
    ],
    "actor_layer1": [
        C(64, 64, 4, 3, 2), C(64, 64, 4, 3, 4), C(32, 64, 4, 3, 2), C(64, 128, 8, 2, 2), C(128, 64, 8, 3, 2),
        C(64, 64, 8, 3), C(64, 64, 8, 2), C(32, 32, 8, 2, 4), C(64, 32, 8, 2, 4),
    ],
    "actor_layers23": [C(64, 32, 8, 2), C(64, 32, 4, 2), C(64, 16, 4, 2), C(32, 32, 4, 2), C(16, 16, 8, 1)],
}  # fmt: skip
# Keys are read through their list or gathered first, as a row of its own says; each has kernels of its own
ROUTES = {name: {"masked_attention_compact": C(0, block, 4, 1)} for name, block in (("listed", 0), ("gathered", 32))}
MAX_SINGLE_BLOCK = 64 * 64  # float32 products are unrolled: larger blocks take minutes to compile, and spill
MARGIN = 0.98  # a candidate replaces the pinned configuration if it takes less than this share of its time


class WrongResultError(RuntimeError):
    """A candidate computes something else than the pinned configuration."""


@dataclass(frozen=True)
class Sizes:
    """What is measured. Configurations of the actor at the last width, for the last two numbers of tokens."""

    tokens: int = 2880
    heads: tuple[int, int] = (32, 8)
    head_dims: tuple[int, ...] = (64, 128, 256)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    actor_tokens: tuple[int, ...] = (576, 1024, 2048, 8 * 576, 2880, 8 * 2880)
    actor_widths: tuple[tuple[int, int], ...] = ((1024, 256), (2048, 256), (4096, 256))  # (d1, d2)


REHEARSAL = Sizes(20, (1, 1), (16,), (torch.float32,), (20,), ((32, 16),))


@dataclass(frozen=True)
class Problem:
    """Something to time: ``run`` launches ``kernel`` (and others, which stay as they are) and returns its results."""

    kernel: str
    size: int
    dtype: torch.dtype
    label: str
    tokens: int
    run: Callable[[], list[Tensor]]
    route: Mapping[str, LaunchConfig] = field(default_factory=dict)  # other rows, without which it does not

    def with_config(self, config: LaunchConfig) -> contextlib.AbstractContextManager[None]:
        return configs.override({**self.route, self.kernel: config})

    def pinned(self, device: torch.device) -> configs.Row:
        """The row of the pinned table that the problem is about."""
        return configs.row(self.kernel, configs.architecture_of(device), size=self.size, dtype=self.dtype)


class Attention:
    """Causal attention, a hard and a soft mask after each other: they share a configuration."""

    def __init__(self, queries: int, head_dim: int, dtype: torch.dtype, device: torch.device, sizes: Sizes) -> None:
        shape = (1, *sizes.heads, queries, sizes.tokens, head_dim)
        self.inputs = [
            make_attention_inputs(*shape, mask=mask, dtype=dtype, device=device) for mask in ("hard", "soft")
        ]
        self.leaves = [[tensor.detach().requires_grad_() for tensor in (x.query, x.key, x.value)] for x in self.inputs]
        self.outputs = self.forward()

    def forward(self) -> list[Tensor]:
        calls = [(*leaves, x.keep_mask) for leaves, x in zip(self.leaves, self.inputs, strict=True)]
        return [masked_attention(*tensors, is_causal=True, backend="triton") for tensors in calls]

    def backward(self, *wanted: int) -> list[Tensor]:
        """The gradients with respect to some of (query, key, value)."""
        gradients: list[Tensor] = []
        for output, leaves, x in zip(self.outputs, self.leaves, self.inputs, strict=True):
            some = [leaves[index] for index in wanted]
            gradients += torch.autograd.grad(output, some, x.grad_output, retain_graph=True)
        return gradients


def attention_problems(device: torch.device, sizes: Sizes) -> Iterator[Problem]:
    """Each kernel on the route that launches it."""
    for dtype, head_dim in itertools.product(sizes.dtypes, sizes.head_dims):
        many, few = (Attention(queries, head_dim, dtype, device, sizes) for queries in (sizes.tokens, 1))
        for kernel, run, route in (
            ("fwd", many.forward, "listed"),
            ("fwd_compact", many.forward, "gathered"),
            ("decode", few.forward, "listed"),
            ("bwd_prepare", partial(many.backward, 0), "listed"),
            ("bwd_dkdv", partial(many.backward, 1, 2), "listed"),
            ("bwd_dq", partial(many.backward, 0), "listed"),
            ("bwd_dq_compact", partial(many.backward, 0), "gathered"),
        ):
            label = f"D={head_dim} {dtype_name(dtype)}"
            yield Problem(f"masked_attention_{kernel}", head_dim, dtype, label, sizes.tokens, run, ROUTES[route])


def actor_problems(device: torch.device, sizes: Sizes) -> Iterator[Problem]:
    """actor_score without a gradient, for few and for many tokens."""
    for dtype, tokens in itertools.product(sizes.dtypes, sizes.actor_tokens[-2:]):
        score = _scorer(device, dtype, tokens, *sizes.actor_widths[-1])
        for kernel in ("actor_layer1", "actor_layers23"):
            yield Problem(kernel, tokens, dtype, f"N={tokens} {dtype_name(dtype)}", tokens, partial(score, "triton"))


def _scorer(device: torch.device, dtype: torch.dtype, tokens: int, d1: int, d2: int) -> Callable[[str], list[Tensor]]:
    """actor_score by the backend that the function is given."""
    weights = make_actor_weights(d1, d2, dtype=dtype, device=device)
    hidden = torch.randn(1, tokens, d1, device=device).to(dtype)

    def score(backend: str) -> list[Tensor]:
        with torch.no_grad():
            return [actor_score(hidden, 0, weights, backend=backend)]

    return score


def timed(
    problem: Problem, device: torch.device, timer: Timer, at_most: int | None = None
) -> dict[LaunchConfig, float | str]:
    """Milliseconds of the pinned configuration, first, and of (the last so many) candidates; or why one does not run.

    Raises:
        WrongResultError: a candidate's results differ from the pinned configuration's.
    """
    from triton.errors import TritonError

    pinned, expected = problem.pinned(device).config, None
    largest = MAX_SINGLE_BLOCK if problem.dtype == torch.float32 else 1 << 30
    possible = [config for config in CANDIDATES[problem.kernel] if config.block_m * config.block_n <= largest]
    found: dict[LaunchConfig, float | str] = {}
    for config in dict.fromkeys([pinned, *possible[-(at_most or 0) :]]):
        with problem.with_config(config):
            try:
                results = problem.run()
            except TritonError as error:
                if config == pinned:
                    raise
                print(f"  {_text(config)}: does not fit ({type(error).__name__})")
                found[config] = f"does not fit ({type(error).__name__})"
                continue
            if expected is None:
                expected = results
            _require_equal(problem, config, results, expected)
            found[config] = timer(problem.run)
    return found


def best_of(found: Mapping[LaunchConfig, float | str]) -> LaunchConfig:
    """The fastest, if it beats the first, which is pinned, by a margin."""
    times = {config: ms for config, ms in found.items() if not isinstance(ms, str)}
    pinned, best = next(iter(times)), min(times, key=lambda config: times[config])
    return best if times[best] < times[pinned] * MARGIN else pinned


def _require_equal(
    problem: Problem, config: LaunchConfig, results: Sequence[Tensor], expected: Sequence[Tensor]
) -> None:
    limit = max(4 * torch.finfo(problem.dtype).eps, 1e-5)
    for got, want in zip(results, expected, strict=True):
        difference, size = (got.double() - want.double()).norm(), want.double().norm()
        if not difference <= limit * size:
            raise WrongResultError(
                f"{problem.kernel} {problem.label} with {_text(config)} is {float(difference / size):.2e} away from "
                f"the result of the pinned configuration, at most {limit:.2e} is rounding; please report this"
            )


def actor_times(device: torch.device, timer: Timer, sizes: Sizes) -> dict[tuple[str, str, Bucket], Times]:
    """actor_score by kernels and by the eager path. A bucket with several points keeps the worst for the kernels."""
    slowest: dict[tuple[str, str, Bucket], Times] = {}
    for dtype, (d1, d2), tokens in itertools.product(sizes.dtypes, sizes.actor_widths, sizes.actor_tokens):
        score = _scorer(device, dtype, tokens, d1, d2)
        times = Times(*(timer(partial(score, backend)) for backend in ("triton", "eager")))
        key = ("actor_score", configs.KINDS[dtype], configs.size_bucket((tokens, d1, d2)))
        print(f"actor_score N={tokens} d1={d1} d2={d2} {dtype}: triton {times.triton:.4f} eager {times.eager:.4f}")
        if key not in slowest or times.triton / times.eager > slowest[key].triton / slowest[key].eager:
            slowest[key] = times
    return slowest


def tune(
    problems: Iterable[Problem],
    device: torch.device,
    timer: Timer,
    at_most: int | None = None,
    rows: Sequence[Row] = (),
) -> tuple[dict[tuple[str, str, int], LaunchConfig], list[Row]]:
    """The best configuration of every problem, also where it is the pinned one; and ``rows`` with one per candidate."""
    best: dict[tuple[str, str, int], LaunchConfig] = {}
    rows = list(rows)
    for problem in problems:
        found = timed(problem, device, timer, at_most)
        (kind, largest, pinned), config = problem.pinned(device), best_of(found)
        times = f"{found[config]:.4f} ms (pinned {found[pinned]:.4f} ms)"
        print(f"{problem.kernel} {problem.label}: {_text(config)} {times}")
        best[problem.kernel, kind, largest] = config
        for each, ms in found.items():
            why = ms if isinstance(ms, str) else ""
            row = {"kernel": problem.kernel, "tokens": problem.tokens, "case": problem.label, "config": _text(each)}
            rows.append({**row, "ms": None if why else ms, "pinned": each == pinned, "note": why})
    return best, rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="", metavar="PATTERN", help="only kernels or ops whose name matches")
    default = f"default: {configs.ENVIRONMENT_VARIABLE}, else the cache"
    parser.add_argument("--output", type=Path, help=f"the file; {default}")
    parser.add_argument("--sweep", type=int, metavar="N", help="time attention of N tokens, and only write --csv")
    parser.add_argument("--csv", type=Path, default="sweep.csv", help="where; rows of other lengths stay")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter, to rehearse")
    options = parser.parse_args(arguments)
    names = [*CANDIDATES, "actor_score"]
    if not any(re.search(options.kernel, name) for name in names):
        print(f"tune: --kernel {options.kernel} matches none of {', '.join(names)}", file=sys.stderr)
        return 2
    if not options.dry_run and not torch.cuda.is_available():
        print(
            "tune: this needs a CUDA device, and torch.cuda.is_available() is False here. Without one the pinned "
            "configurations apply; python bench/compile_report.py shows what the compiler makes of them.",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", torch.cuda.current_device())
    timer = wall_timer if options.dry_run else cuda_timer
    try:
        if options.sweep:
            sweep(device, options.sweep, options.csv, timer)
            return 0
        path = run(device, options.kernel, options.output, timer)
    except RuntimeError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1
    print(f"written: {path}")
    with using(path):
        print(configs.describe(device))
    return 0


def sweep(device: torch.device, tokens: int, path: Path, timer: Timer) -> None:
    """Time all candidates for attention of so many tokens, at D = 128 in bfloat16."""
    rehearse = device.type == "cpu"
    sizes = REHEARSAL if rehearse else Sizes(tokens, head_dims=(128,), dtypes=(torch.bfloat16,))
    problems = (replace(problem, tokens=tokens) for problem in attention_problems(device, sizes))
    others = [row for row in read_csv(path) if row["tokens"] != tokens]
    write_csv(path, tune(problems, device, timer, 1 if rehearse else None, others)[1])


def run(device: torch.device, only: str, output: Path | None, timer: Timer) -> Path:
    """Measure and write the file; returns its path. CPU tensors rehearse: tiny sizes, a small candidate per kernel."""
    rehearse = device.type == "cpu"
    sizes = REHEARSAL if rehearse else Sizes()
    capability = "sm_90" if rehearse else configs.capability_name(device)
    path = output or configs.measurements_path(capability)
    known = Measurements("rehearsal" if rehearse else torch.cuda.get_device_name(device), {}, {})
    if only and path.exists():
        with contextlib.suppress(configs.OtherVersionError):  # nothing in it to keep
            known = configs.read(path, capability, configs.architecture_of(device))
    wanted = {name for name in CANDIDATES if re.search(only, name)}
    sources = {"masked_attention": attention_problems, "actor": actor_problems}
    problems = (
        problem
        for prefix, make in sources.items()
        if any(name.startswith(prefix) for name in wanted)
        for problem in make(device, sizes)
        if problem.kernel in wanted
    )
    known.configs.update(tune(problems, device, timer, 1 if rehearse else None)[0])
    write(path, capability, known)
    if re.search(only, "actor_score"):
        with using(path):  # with the configurations just measured
            known.times.update(actor_times(device, timer, sizes))
        write(path, capability, known)
    return path


def write(path: Path, capability: str, measurements: Measurements) -> None:
    """Write a file that ``configs.read`` takes. Atomic: a reader sees the old content or the new one."""
    content = {
        "format": configs.FORMAT, "architecture": capability, "triton": configs.triton_version(),
        "torch": torch.__version__, "device": measurements.device,
        "configs": [
            {"kernel": kernel, "dtype": kind, "size": size, "config": list(config)}
            for (kernel, kind, size), config in measurements.configs.items()
        ],
        "times": [
            {"op": op, "dtype": kind, "bucket": list(sizes), "triton_ms": times.triton, "eager_ms": times.eager}
            for (op, kind, sizes), times in measurements.times.items()
        ],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(content, indent=1))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    configs.forget()


@contextlib.contextmanager
def using(path: Path) -> Iterator[None]:
    """Take the measurements from this file for a while."""
    with mock.patch.dict(os.environ, {configs.ENVIRONMENT_VARIABLE: str(path)}):
        configs.forget()
        yield
    configs.forget()


def wall_timer(call: Callable[[], object]) -> float:
    """Milliseconds of a single call, for rehearsals."""
    return milliseconds(call, torch.device("cpu"))[0]


def cuda_timer(call: Callable[[], object]) -> float:
    """Median milliseconds with a cold L2 cache."""
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))


def _text(config: LaunchConfig) -> str:
    return ",".join(map(str, config))


if __name__ == "__main__":
    sys.exit(main())
