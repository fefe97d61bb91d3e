"""What the tests of caches and decoding share: one model and one padded batch per family, and runs of generate()."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tests.models.agreement import keeps_state, model_of, schedule_of, with_keys
from tests.models.by_hand import by_hand
from tests.models.conftest import HashPolicy
from tests.models.tiny_families import NUM_LAYERS, TOKEN_ARGUMENTS, build_inputs, tiny_family, visual_mask
from toprl_models import Policy, Pruner, Schedule, attach

BATCH = (("image",), ("image", "image"), ())
SINGLE = (("image", "image"),)
NEW_TOKENS = 8
CACHES = ("past_key_values", "cache_implementation", "disable_compile", "prefill_chunk_size", "use_cache")
TOLERANCE = 1e-4  # of logits up to about 10, between two float32 computations


def keep_all(family: str) -> Schedule:
    return Schedule(((tiny_family(family).min_stage, 1.0), (5, 1.0)))


def inputs_of(family: str, rows: Any = BATCH) -> dict[str, Tensor]:
    return build_inputs(family, rows)


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Greedy unless told otherwise, and always from the same seed; logits ``[step, B, V]`` come along."""
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    output = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    output.tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
    output.logits = torch.stack(output.logits)
    return output


def pruned(
    family: str,
    mode: str,
    inputs: dict[str, Tensor],
    *,
    policy: Policy | None = None,
    schedule: Schedule | None = None,
    model: Any = None,
    **options: Any,
) -> Any:
    """Output of generate() with a Pruner attached; the pruner, detached, comes along.

    Where layers keep a state, mode "mask" is pruning by hand, without a cache.
    """
    model, schedule = model_of(family) if model is None else model, schedule or schedule_of(family)
    if mode == "mask" and keeps_state(model):
        assert policy is None or isinstance(policy, HashPolicy)
        options = {name: value for name, value in options.items() if name not in CACHES}
        with by_hand(model, schedule):
            return generate(model, inputs, **options)
    with attach(model, policy or HashPolicy(), schedule=schedule, mode=mode) as pruner:
        output = generate(model, inputs, **options)
    output.pruner = pruner
    return output


@functools.cache
def greedy(family: str, mode: str, rows: Any = BATCH) -> Any:
    """The plain case that others are compared with: mode "unattached", "compact" or "mask", DynamicCache, greedy."""
    inputs = inputs_of(family, rows)
    return generate(model_of(family), inputs) if mode == "unattached" else pruned(family, mode, inputs)


def assert_same(output: Any, expected: Any) -> None:
    """Equal tokens, and logits equal to rounding."""
    assert torch.equal(output.tokens, expected.tokens)
    torch.testing.assert_close(output.logits, expected.logits, atol=TOLERANCE, rtol=0)


def assert_pruning_matters(output: Any, family: str, rows: Any = BATCH) -> None:
    """A comparison of two pruned runs could not fail if pruning changed nothing."""
    assert (output.logits[0] - greedy(family, "unattached", rows).logits[0]).abs().max() > 0.1


def expected_lengths(pruner: Pruner, inputs: dict[str, Tensor], new: int = 0) -> list[int]:
    """Tokens in each layer's cache: the longest row's text and surviving visual tokens, and ``new`` more."""
    valid, visual = inputs["attention_mask"].bool(), visual_mask(inputs)
    text = (valid & ~visual).sum(1)
    lengths = []
    for layer in range(NUM_LAYERS):
        done = [stage for stage in pruner.trace if stage.layer <= layer]
        longest = int((text + torch.tensor(done[-1].counts)).max()) if done else valid.shape[1]
        lengths.append(longest + new)
    return with_keys(pruner.model, lengths)


def more_text(inputs: dict[str, Tensor], count: int = 5, seed: int = 7) -> Tensor:
    """Words of a second turn, one row per row of ``inputs``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 90, (len(inputs["input_ids"]), count), generator=generator)


def with_answer(inputs: dict[str, Tensor], words: Any) -> dict[str, Tensor]:
    """Append an answer, ``words`` [n] or [B, n], to every row."""
    answer = torch.as_tensor(words).expand(len(inputs["input_ids"]), -1)
    longer = dict(inputs)
    for name, fill in TOKEN_ARGUMENTS.items():
        if name in inputs:
            if name == "token_type_ids" and not inputs[name].any():
                fill = 1  # PaliGemma: 0 is a prompt whose tokens see each other
            addition = answer if name == "input_ids" else torch.tensor(fill).expand(answer.shape).to(inputs[name].dtype)
            longer[name] = torch.cat([inputs[name], addition], 1)
    return longer
