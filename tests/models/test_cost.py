"""What pruning must not cost: waits for the device, masks nobody needs, work per layer instead of per stage."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.agreement import MIXED, assert_agreement, attached, generate, layer_arguments, model_of, schedule_of
from tests.models.conftest import HashPolicy
from tests.models.tiny_families import FAMILY_NAMES, FIRST_WORD, HIDDEN_SIZE, NUM_LAYERS, build_inputs, build_model
from toprl_models import Decision, FastV, Policy, PyramidDrop, RandomPolicy, TopRLPolicy, attach
from toprl_models.runtime import prompt, shortened

aten = torch.ops.aten
# what stops the host until the device is done
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2}
ONE_WAIT = {"cpu": 1}  # the copy of the prompts' flags to the host, at the start of a prefill


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.overloadpacket in WAITS:
            self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Counts what would wait for a GPU: operators, and calls that on the CPU need none."""

    def counting(function: Callable[..., Any], name: str, only_with: str = "") -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not only_with or only_with in kwargs:
                mode.counts[name] += 1
            return function(*args, **kwargs)

        return wrapper

    def on_host(*args: Any) -> Any:  # tensors of the host: nothing waits
        before = mode.counts.copy()
        facts = read_prompt(*args)
        mode.counts.clear()
        mode.counts.update(before)
        return facts

    read_prompt = prompt.read_prompt
    with pytest.MonkeyPatch.context() as patch, _Operators() as mode:
        patch.setattr(prompt, "read_prompt", on_host)
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(Tensor, name, counting(getattr(Tensor, name), name))
        patch.setattr(torch, "tensor", counting(torch.tensor, "tensor to device", only_with="device"))
        yield mode.counts


def more_waits(family: str, inputs: dict[str, Tensor], policy: Policy, mode: str = "compact") -> Counter[str]:
    """Those of an attached forward pass, less those of an unattached one."""
    model = model_of(family)
    with waits() as own:
        model(**inputs)
    with attach(model, policy, schedule=schedule_of(family), mode=mode) as one, waits() as counts:
        model(**inputs)
    assert len(one.trace) == 3
    return counts - own


def equally_long(family: str) -> dict[str, Tensor]:
    """One and two images in prompts of one length: no padding, until the stages leave different numbers of tokens."""
    inputs = build_inputs(family, (("image",), ("image", "image")))
    inputs["input_ids"][inputs["attention_mask"] == 0] = FIRST_WORD
    inputs["attention_mask"][:] = 1
    return inputs


def twice(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([value, value]) for name, value in inputs.items()}


# --- waits for the device ---


@pytest.mark.parametrize("mode", ["compact", "mask"])
@pytest.mark.parametrize("rows", [(("image",),), MIXED])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_prefill_waits_once_and_its_stages_never(family: str, rows: Any, mode: str) -> None:
    assert more_waits(family, build_inputs(family, rows), HashPolicy(), mode) == ONE_WAIT


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_an_unpadded_batch_that_becomes_ragged_waits_once(family: str) -> None:
    inputs = equally_long(family)
    assert more_waits(family, inputs, HashPolicy()) == ONE_WAIT
    assert_agreement(model_of(family), inputs, schedule_of(family))


@pytest.mark.parametrize(
    "make",
    [
        FastV,
        lambda: PyramidDrop("original"),
        RandomPolicy,
        lambda: TopRLPolicy(HIDDEN_SIZE, list(schedule_of("llava").layers), 8),
    ],
    ids=["FastV", "PyramidDrop", "RandomPolicy", "TopRLPolicy"],
)
@pytest.mark.parametrize("mode", ["compact", "mask"])
def test_no_policy_waits(make: Callable[[], Policy], mode: str) -> None:
    assert more_waits("llava", build_inputs("llava", MIXED), make(), mode) == ONE_WAIT


def test_renumbering_waits_no_more() -> None:
    assert more_waits("llava", build_inputs("llava", MIXED), PyramidDrop("renumbered")) == ONE_WAIT


class Half(Policy):
    """Decides how many tokens stay by itself: the host has to ask for the number."""

    def decide(self, context: Any) -> Decision:
        return Decision(context.visual_index.float(), context.visual_index % 2 == 0)


def test_counts_that_a_policy_chooses_cost_one_wait_per_stage() -> None:
    assert more_waits("llava", build_inputs("llava"), Half()) == ONE_WAIT | {"tolist": 3}


@pytest.mark.parametrize("mode", ["compact", "mask"])
@pytest.mark.parametrize("rows", [(("image",),), MIXED])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_decoding_waits_no_more_than_unattached(family: str, rows: Any, mode: str) -> None:
    model, inputs = model_of(family), build_inputs(family, rows)
    with waits() as own:
        generate(model, inputs, max_new_tokens=4)
    with attached(model, schedule_of(family), mode), waits() as counts:
        generate(model, inputs, max_new_tokens=4)
    assert counts - own == ONE_WAIT  # the prompt's


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(("image",),), MIXED])
def test_a_prefill_waits_once_on_a_gpu(rows: Any) -> None:
    """By the driver's own account."""
    model = build_model("llava").cuda()
    inputs = {name: value.cuda() for name, value in build_inputs("llava", rows).items()}

    def count() -> int:
        model(**inputs)  # compiles kernels
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                model(**inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(one.message) for one in caught)

    own = count()
    with attached(model, schedule_of("llava")):
        assert count() - own <= 1


# --- masks and rotary tables ---


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_no_mask_is_made_for_an_unpadded_batch(family: str) -> None:
    """sdpa without a mask takes its fast kernel; in a padded batch there must be one."""
    model = model_of(family)
    with attached(model, schedule_of(family)):
        seen = layer_arguments(model, twice(build_inputs(family)))
        padded = layer_arguments(model, build_inputs(family, MIXED))
    assert [seen[layer]["attention_mask"] for layer in range(NUM_LAYERS)] == [None] * NUM_LAYERS
    assert all(padded[layer]["attention_mask"] is not None for layer in range(NUM_LAYERS))


@pytest.mark.parametrize("rows", [(("image",),), MIXED])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_masks_and_rotary_tables_are_made_once_per_stage(
    family: str, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Counter[str] = Counter()

    def counting(name: str) -> None:
        function = getattr(shortened, name)

        def wrapper(*args: Any) -> Any:
            made[name] += 1
            return function(*args)

        monkeypatch.setattr(shortened, name, wrapper)

    for name in ("gather_tables", "picked_mask", "rebuild_mask"):
        counting(name)
    model, schedule = model_of(family), schedule_of(family)
    # more layers behind a stage than stages, or per layer and per stage would be the same
    assert NUM_LAYERS - schedule.layers[0] > len(schedule)
    with attached(model, schedule):
        seen = layer_arguments(model, build_inputs(family, rows))
    # the stage gathers the tables with the states
    assert made == ({"picked_mask": len(schedule)} if rows == MIXED else {})
    for stage, layer in enumerate(schedule.layers):
        end = (*schedule.layers, NUM_LAYERS)[stage + 1]
        for other in range(layer, end):
            assert seen[other]["position_embeddings"] is seen[layer]["position_embeddings"]
            assert seen[other]["attention_mask"] is seen[layer]["attention_mask"]
