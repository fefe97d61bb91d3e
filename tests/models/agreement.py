"""What both modes must agree on, and Eqs. 6-7 once more from transformers' own attention."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.by_hand import by_hand
from tests.models.conftest import HashPolicy
from tests.models.tiny_families import Rows, assemble, build_model, parts_of, tiny_family, visual_mask
from toprl_models import Policy, Pruner, Schedule, StageTrace, attach
from toprl_models.probe import decoder_of
from toprl_models.runtime.scores import fitting_layers

NEW_TOKENS = 8
# float32 rounding of the same sums in another order; the states are around 1, the logits around 2
ATOL = 1e-4
MIXED = (("image",), ("image", "image"), ())


@functools.cache
def model_of(family: str, attn_implementation: str = "sdpa") -> Any:
    """One model for all tests of a family: they leave it as it was."""
    return build_model(family, attn_implementation)


@dataclass
class Run:
    """One prompt batch through one model: last hidden states, then a greedy answer with the logits of each step."""

    states: Tensor
    logits: Tensor
    tokens: Tensor
    trace: list[StageTrace]


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def attached(model: Any, schedule: Schedule, mode: str = "compact") -> Pruner:
    """A pruner whose scores are the same in both modes."""
    return attach(model, HashPolicy(), schedule=schedule, mode=mode)


def run(model: Any, inputs: dict[str, Tensor], schedule: Schedule | None = None, mode: str = "compact") -> Run:
    """Unattached without a schedule; "mask" is by hand where layers keep a state, from which masks cannot take."""
    if schedule is None:
        return _run(model, inputs)
    if mode == "mask" and keeps_state(model):
        with by_hand(model, schedule):
            return _run(model, inputs)
    with attached(model, schedule, mode) as pruner:
        result = _run(model, inputs)
        result.trace = pruner.trace
    return result


def states_of(model: Any, inputs: dict[str, Tensor], schedule: Schedule, mode: str) -> Tensor:
    """Last hidden states of a pruned prompt; "mask" as in ``run``."""
    by_a_hand = mode == "mask" and keeps_state(model)
    with by_hand(model, schedule) if by_a_hand else attached(model, schedule, mode):
        return last_states(model, **inputs)


def _run(model: Any, inputs: dict[str, Tensor]) -> Run:
    states = last_states(model, **inputs)
    answer = generate(model, inputs)
    return Run(states, torch.stack(answer.logits, 1), answer.sequences[:, inputs["input_ids"].shape[1] :], [])


def schedule_of(family: str) -> Schedule:
    """Three stages, the first as early inside the decoder as the family allows, the last before the last layer."""
    first = max(1, tiny_family(family).min_stage)
    return Schedule(((first, 0.5), (first + 1, 0.25), (5, 2)))


def keeps_state(model: Any) -> bool:
    """Tell whether layers keep a state of all earlier tokens: a convolution, a recurrence."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return "conv" in kinds or "linear_attention" in kinds


def modes_of(model: Any) -> tuple[str, ...]:
    """Name the modes that a model has; where layers keep a state, mask mode is refused by name."""
    if not keeps_state(model):
        return ("compact", "mask")
    with pytest.raises(ValueError, match=r'keeps a state of all earlier tokens.*mode="mask" cannot support'):
        attach(model, HashPolicy(), schedule=Schedule(((1, 0.5),)), mode="mask")
    return ("compact",)


def fitting(model: Any, policy: Policy, schedule: Schedule) -> Schedule:
    """Move stages on to layers that offer the attention that ``policy`` reads."""
    reads = [policy.at_stage(stage).attention_from for stage in range(len(schedule))]
    layers = fitting_layers(decoder_of(model), schedule.layers, reads)
    return Schedule(tuple((layer, keep) for layer, (_, keep) in zip(layers, schedule.stages, strict=False)))


def lengths_of(cache: Any) -> list[int]:
    """Keys and values of every layer that has them."""
    return [int(cache.get_seq_length(layer)) for layer, one in enumerate(cache.layers) if hasattr(one, "keys")]


def last_states(model: Any, **inputs: Any) -> Tensor:
    """[B, N, d]: what the head gets. Llama 4 has no model without a head."""
    if model.base_model is model:
        return model(**inputs, output_hidden_states=True).hidden_states[-1]
    return model.base_model(**inputs).last_hidden_state


def with_keys(model: Any, lengths: Sequence[int]) -> list[int]:
    """Pick of a list with a number for each layer those of the layers with keys."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"] * len(lengths)
    return [length for length, kind in zip(lengths, kinds, strict=True) if "attention" in kind and "linear" not in kind]


def expected_counts(inputs: dict[str, Tensor], schedule: Schedule) -> list[tuple[int, ...]]:
    """Kept tokens by stage and row."""
    rows = [schedule.counts(n) for n in (visual_mask(inputs) & inputs["attention_mask"].bool()).sum(1).tolist()]
    return [tuple(row[stage] for row in rows) for stage in range(len(schedule))]


def kept_slots(inputs: dict[str, Tensor], stage: StageTrace) -> Tensor:
    """bool [B, N]: text, and the visual tokens that ``stage`` left."""
    alive, visual = inputs["attention_mask"].bool().clone(), visual_mask(inputs)
    ordinal = visual.cumsum(1) - 1
    for row, kept in enumerate(stage.indices):
        alive[row] &= ~visual[row] | torch.isin(ordinal[row], kept[kept >= 0])
    return alive


def assert_agreement(model: Any, inputs: dict[str, Tensor], schedule: Schedule, *, masked: Any = None) -> Run:
    """Compact mode is mask mode, on the surviving rows of the prompt and at each step of a greedy answer.

    Args:
        model: runs in compact mode.
        inputs: of ``build_inputs``.
        schedule: drops something.
        masked: the model for mask mode, if it is another one.

    Returns:
        The compact run.
    """
    plain, compact = run(model, inputs), run(model, inputs, schedule)
    mask = run(model if masked is None else masked, inputs, schedule, "mask")
    assert [stage.counts for stage in compact.trace] == expected_counts(inputs, schedule)
    for one, other in zip(compact.trace, mask.trace, strict=not keeps_state(model)):  # a hand leaves no trace
        assert torch.equal(one.indices, other.indices)
    alive = kept_slots(inputs, compact.trace[-1])
    torch.testing.assert_close(compact.states[alive], mask.states[alive], atol=ATOL, rtol=1e-4)
    torch.testing.assert_close(compact.logits, mask.logits, atol=ATOL, rtol=1e-4)
    assert torch.equal(compact.tokens, mask.tokens)
    # none of this could fail if pruning changed nothing
    with_images = visual_mask(inputs).any(1)
    assert (compact.states - plain.states)[alive].abs().max() > 0.1
    assert ((compact.logits - plain.logits)[with_images, -1].abs().amax(-1) > 0.1).all()
    return compact


def layer_arguments(model: Any, inputs: dict[str, Tensor]) -> dict[int, dict[str, Any]]:
    """The keyword arguments that each decoder layer got in one forward pass."""
    seen: dict[int, dict[str, Any]] = {}
    handles = [
        # runs behind the pruner's hook, which was there first
        layer.register_forward_pre_hook(lambda _, args, kwargs, i=i: seen.update({i: kwargs}), with_kwargs=True)
        for i, layer in enumerate(decoder_of(model).layers)
    ]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def masked_by_hand(model: Any, inputs: dict[str, Tensor], trace: list[StageTrace]) -> Tensor:
    """Last hidden states under Eqs. 6-7: an eager model whose own 4-D masks lose the keys that the stages dropped."""
    assert model.config.get_text_config()._attn_implementation == "eager"
    decoder = decoder_of(model)

    def close(stage: StageTrace) -> Any:
        keep = kept_slots(inputs, stage)
        seen = keep[:, None, None] | torch.eye(keep.shape[1], dtype=torch.bool)

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            mask = kwargs["attention_mask"]
            return args, kwargs | {"attention_mask": mask.masked_fill(~seen, torch.finfo(mask.dtype).min)}

        return hook

    handles = []
    for number, stage in enumerate(trace):
        end = trace[number + 1].layer if number + 1 < len(trace) else len(decoder.layers)
        for layer in decoder.layers[stage.layer : end]:
            handles.append(layer.register_forward_pre_hook(close(stage), with_kwargs=True))
    try:
        return last_states(model, **inputs)
    finally:
        for handle in handles:
            handle.remove()


def single_row(family: str, inputs: dict[str, Tensor], rows: Rows, number: int) -> dict[str, Tensor]:
    """Row ``number`` of a batch that ``build_inputs(family, rows)`` made, alone and without padding."""
    prompts, items = parts_of(family, rows)
    single = assemble(tiny_family(family), [prompts[number]], [items[number]], [rows[number]])
    assert torch.equal(single["input_ids"][0], inputs["input_ids"][number][inputs["attention_mask"][number].bool()])
    return {name: value.to(inputs[name].dtype) for name, value in single.items()}
