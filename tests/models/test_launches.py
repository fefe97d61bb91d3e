"""What a pruned prefill launches, counted operation by operation, and that its stages wait for nothing.

On the CPU a dispatched aten operation stands for the kernel that it is on a GPU; views, allocations and constants
launch nothing. A custom op is seen as one operation and counts as its kernels: that many launches are in the source of
its ``triton.py`` (up to 4,096 tokens, with folded weights).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from toprl_models import Policy, Schedule, attach, tiny
from toprl_models.methods.toprl import TopRLPolicy
from toprl_models.runtime import prompt
from toprl_models.runtime.hooks import Runtime

KERNELS = {"actor_score": 2}
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "item"}
UPLOADS = {"lift_fresh"}  # torch.tensor(list)
NOTHING = WAITS | UPLOADS | {"empty", "detach", "split_with_sizes", "empty_like", "new_empty", "alias"}
STAGES = ((1, 0.5), (2, 0.25), (4, 8))


class Operations(TorchDispatchMode):
    """Names of the operations that are dispatched."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not function.is_view:
            self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


def launches(names: list[str]) -> int:
    return sum(KERNELS.get(name, 1) for name in names if name not in NOTHING)


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Operations of the pruner's hooks: "begin", "stage 0" ..., "layers" and "end"."""
    seen: dict[str, list[str]] = defaultdict(list)

    def watch(name: str, room: Callable[..., str]) -> None:
        original = getattr(Runtime, name)

        def watched(self: Runtime, *args: Any) -> Any:
            with Operations(seen[room(self, *args)]):
                return original(self, *args)

        monkeypatch.setattr(Runtime, name, watched)

    def layer(self: Runtime, index: int, *_: Any) -> str:
        return f"stage {self._stage_at[index].number}" if index in self._stage_at else "layers"

    for name in ("_before_model", "_before_decoder"):
        watch(name, lambda *_: "begin")
    watch("before_layer", layer)
    watch("_after_decoder", lambda *_: "end")
    on_host = prompt.read_prompt

    def read_prompt(*args: Any) -> Any:  # its tensors are on the host, where no operation is a launch
        before = len(seen["begin"])
        facts = on_host(*args)
        del seen["begin"][before:]
        return facts

    monkeypatch.setattr(prompt, "read_prompt", read_prompt)
    return seen


def inputs_of(color: str, rows: int = 1) -> dict[str, torch.Tensor]:
    _, processor = tiny.load()
    texts = [tiny.prompt(text) for text in ("which digit is in the picture ?", "is there a digit ?")][:rows]
    return processor(images=[Image.new("RGB", (128, 128), color)] * rows, text=texts, padding=True, return_tensors="pt")


def test_launches_of_a_prefill(rooms: dict[str, list[str]]) -> None:
    """Three stages, batch 1. Before there were 49 at the beginning, 38 + 42 + 42 in the stages, 2 at the end."""
    model, _ = tiny.load()
    policy = TopRLPolicy(tiny.HIDDEN_SIZE, [layer for layer, _ in STAGES], actor_size=16).eval()
    with attach(model, policy, schedule=Schedule(STAGES)), torch.no_grad():
        model(**inputs_of("red"))
    for stage in range(3):
        names = rooms[f"stage {stage}"]
        assert launches(names) == 4, names
        assert not WAITS & set(names), "a stage waits for the device"
        assert not UPLOADS & set(names), "a stage copies numbers to the device"
    # mask as bool, isin, three cat, of which two on the host; copies to the host (1) and back (2) are none on the CPU
    assert launches(rooms["begin"]) == 5, rooms["begin"]
    assert launches(rooms["layers"]) == 0
    assert launches(rooms["end"]) <= 2


def test_a_fixed_prompt_begins_with_nothing(rooms: dict[str, list[str]]) -> None:
    """The second pass can be captured: 14 launches of the pruner, on other pixels, and nothing that waits."""
    model, _ = tiny.load()
    policy = TopRLPolicy(tiny.HIDDEN_SIZE, [layer for layer, _ in STAGES], actor_size=16).eval()
    with attach(model, policy, schedule=Schedule(STAGES)) as pruner, torch.no_grad():
        want, other = (model(**inputs_of(color)).logits for color in ("blue", "red"))
        with pruner.fixed_prompt():
            model(**inputs_of("red"))
            rooms.clear()
            got = model(**inputs_of("blue")).logits
        names = [name for room in rooms.values() for name in room]
    assert torch.equal(got, want)
    assert not torch.equal(got, other)
    assert (launches(rooms["begin"]), launches(names)) == (0, 14)
    assert not (WAITS | UPLOADS) & set(names)


@pytest.mark.gpu
def test_a_prefill_is_one_cuda_graph() -> None:
    model = tiny.load()[0].cuda()
    policy = TopRLPolicy(tiny.HIDDEN_SIZE, [layer for layer, _ in STAGES], actor_size=16).eval().cuda()
    inputs, other = ({name: x.cuda() for name, x in inputs_of(color).items()} for color in ("red", "blue"))
    with attach(model, policy, schedule=Schedule(STAGES)) as pruner, torch.no_grad():
        want = model(**other, use_cache=False).logits
        with pruner.fixed_prompt():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles kernels
                for _ in range(3):
                    model(**inputs, use_cache=False)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = model(**inputs, use_cache=False).logits
            inputs["pixel_values"].copy_(other["pixel_values"])
            graph.replay()
    torch.testing.assert_close(captured, want)


class First(Policy):
    def score(self, context: Any) -> torch.Tensor:
        return -context.visual_index.float()


def test_ragged_rows_wait_for_nothing(rooms: dict[str, list[str]]) -> None:
    """Rows whose texts differ in length, a policy that is given states, and budgets that differ with an image less."""
    model, _ = tiny.load()
    inputs = inputs_of("red", rows=2)
    visual = inputs["input_ids"] == model.config.image_token_id
    drop = visual & (visual.cumsum(1) > 40) & (torch.arange(2)[:, None] == 1)
    inputs["attention_mask"] = inputs["attention_mask"].masked_fill(drop, 0)
    with attach(model, First(), schedule=Schedule(STAGES)) as pruner, torch.no_grad():
        model(**inputs)
    assert [trace.counts for trace in pruner.trace] == [(32, 20), (16, 10), (8, 8)]
    for stage in range(3):
        assert not (WAITS | UPLOADS) & set(rooms[f"stage {stage}"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs interpreted kernels on CPU tensors")
@pytest.mark.parametrize("rows", [1, 2])
def test_kernels_prune_like_the_eager_path(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole prefill on interpreted kernels: the same tokens and logits, padded rows with budgets of their own too."""
    model, _ = tiny.load()
    torch.manual_seed(0)
    policy = TopRLPolicy(tiny.HIDDEN_SIZE, [layer for layer, _ in STAGES], actor_size=16).eval()
    torch.nn.init.normal_(policy.head.weight)
    inputs = inputs_of("red", rows)
    inputs["pixel_values"] = torch.randn_like(inputs["pixel_values"])
    if rows == 2:
        visual = inputs["input_ids"] == model.config.image_token_id
        inputs["attention_mask"][1] &= ~(visual & (visual.cumsum(1) > 40))[1]
    results = []
    for backend in ("eager", "triton"):
        monkeypatch.setenv("TOPRL_KERNELS_BACKEND", backend)
        with attach(model, policy, schedule=Schedule(STAGES)) as pruner, torch.no_grad():
            results.append((model(**inputs).logits, [trace.indices for trace in pruner.trace]))
    (eager, kept), (triton, kept_by_kernels) = results
    assert all(map(torch.equal, kept, kept_by_kernels))
    assert torch.equal(eager, triton)  # gathers are exact
