"""Prompts that come in pieces: an image once and questions later, or embeddings that hold the image features."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.agreement import lengths_of, model_of
from tests.models.conftest import HashPolicy
from tests.models.features import METHODS_NOT_APPLICABLE, feature
from tests.models.tiny_families import (
    HIDDEN_SIZE,
    NUM_LAYERS,
    TOKEN_ARGUMENTS,
    build_inputs,
    build_model,
    tiny_family,
    visual_mask,
)
from toprl_models import (
    METHODS,
    DivPrune,
    FasterVLM,
    FastV,
    PyramidDrop,
    RandomPolicy,
    Schedule,
    SparseVLM,
    TopRLPolicy,
    VisionZip,
    attach,
)
from toprl_models.probe import decoder_of

STAGES = Schedule(((2, 0.5), (3, 0.25), (5, 2)))


def blind(family: str) -> dict[str, tuple[Any, Schedule]]:
    """Policies that read no question, each with a schedule."""

    def toprl() -> TopRLPolicy:
        torch.manual_seed(0)
        return TopRLPolicy(HIDDEN_SIZE, [2, 3, 5], 8)

    inside = {"hash": (HashPolicy, STAGES), "random": (RandomPolicy, STAGES), "toprl": (toprl, STAGES)}
    before = {"divprune": DivPrune, "fastervlm": FasterVLM, "visionzip": VisionZip}
    assert set(before) <= set(METHODS)
    schedule = Schedule(((0, 4),))
    return inside | {
        name: (make, schedule) for name, make in before.items() if (name, family) not in METHODS_NOT_APPLICABLE
    }


def split(inputs: dict[str, Tensor], marks: Sequence[int] = ()) -> tuple[dict[str, Tensor], Tensor]:
    """The prompt up to its image and the ``marks`` behind it, and the ids of the question."""
    belongs = visual_mask(inputs) | torch.isin(inputs["input_ids"], torch.tensor(marks, dtype=torch.int64))
    end = int(belongs[0].nonzero().max()) + 1
    prefix = {name: value[:, :end] if name in TOKEN_ARGUMENTS else value for name, value in inputs.items()}
    return prefix, inputs["input_ids"][:, end:]


@feature("image-only prefix for many questions")
def test_one_image_cache_serves_many_questions(family: str) -> None:
    """Image first and question later is the whole prompt at once, for another question on a copy of the cache too."""
    model, inputs = model_of(family), build_inputs(family)
    # Ovis2 makes features of the marks around an image, in the pass that holds the pixels
    prefix, question = split(inputs, getattr(model.config, "visual_indicator_token_ids", ()))
    for name, (make, schedule) in blind(family).items():
        with attach(model, make(), schedule=schedule) as pruner:
            cache = model(**prefix, use_cache=True).past_key_values
            trace = pruner.trace
            for words in (question, question.flip(1)):
                whole = inputs | {"input_ids": torch.cat([prefix["input_ids"], words], 1)}
                after = model(input_ids=words, past_key_values=copy.deepcopy(cache)).logits
                with pruner_of(pruner, make):
                    logits = model(**whole).logits[:, -words.shape[1] :]
                torch.testing.assert_close(after, logits, atol=1e-4, rtol=1e-4, msg=name)
            assert torch.equal(trace[0].indices, pruner.trace[0].indices)


class pruner_of:
    """Gives a policy that draws the same draws again."""

    def __init__(self, pruner: Any, make: Any) -> None:
        self.policy, self.fresh = pruner.policy, make()

    def __enter__(self) -> None:
        if isinstance(self.policy, RandomPolicy):
            self.policy.generator.set_state(self.fresh.generator.get_state())

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("make", [FastV, PyramidDrop, SparseVLM])
def test_methods_that_read_the_question_refuse_a_prefix(make: Any) -> None:
    model = model_of("llava")
    prefix, _ = split(build_inputs("llava"))
    with attach(model, make(), schedule=Schedule(((2, 4),))), pytest.raises(ValueError, match="no question"):
        model(**prefix)


def test_generating_after_a_bare_image_is_refused() -> None:
    model = model_of("llava")
    prefix, _ = split(build_inputs("llava"))
    with attach(model, HashPolicy(), schedule=STAGES), pytest.raises(ValueError, match=r"prompt of generate\(\)"):
        model.generate(**prefix, max_new_tokens=2)


def filled(family: str, model: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """The prompt as embeddings that hold the image features, and which slots these are."""
    entered: list[Tensor] = []
    handle = decoder_of(model).register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    prompt: dict[str, Any] = {"inputs_embeds": entered[0], "attention_mask": inputs["attention_mask"]}
    prompt |= {name: inputs[name] for name in ("token_type_ids",) if name in inputs}
    if hasattr(model.base_model, "get_rope_index"):
        prompt["position_ids"] = model.base_model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )[0]
    return prompt, visual_mask(inputs)


@feature("inputs_embeds that hold the features")
def test_embeddings_with_a_visual_mask_are_the_ids(family: str) -> None:
    if "deepstack_visual_embeds" in inspect.signature(decoder_of(model_of(family)).forward).parameters:
        # deepstack adds features of the vision tower, which embeddings do not bring along: compare modes
        return modes_agree(family)
    model, inputs = model_of(family), build_inputs(family, (("image",), ("image", "image")))
    prompt, mask = filled(family, model, inputs)
    real = inputs["attention_mask"].bool()
    for make in (HashPolicy, FastV):
        with attach(model, make(), schedule=Schedule(((3, 4),))) as pruner:
            expected, trace = model(**inputs).logits, pruner.trace
            logits = model(**prompt, visual_mask=mask).logits
            assert torch.equal(pruner.trace[0].indices, trace[0].indices)
            if tiny_family(family).is_qwen:
                assert torch.equal(model(**prompt, mm_token_type_ids=inputs["mm_token_type_ids"]).logits, logits)
        torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4)


def modes_agree(family: str) -> None:
    model, inputs = model_of(family), build_inputs(family)
    prompt, mask = filled(family, model, inputs)
    logits = []
    for mode in ("compact", "mask"):
        with attach(model, HashPolicy(), schedule=Schedule(((3, 4),)), mode=mode):
            logits.append(model(**prompt, visual_mask=mask).logits[:, -1])
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.since("5.19")  # older releases give images to other rows where beams repeat them
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_generate_takes_a_visual_mask_and_a_prompt_length(family: str) -> None:
    """Also with beams, which repeat the rows."""
    model, inputs = model_of(family), build_inputs(family, (("image",), ("image",)))
    prompt, mask = filled(family, model, inputs)
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    length = inputs["input_ids"].shape[1]
    with attach(model, FastV(), schedule=Schedule(((3, 4),))) as pruner:
        expected = model.generate(**inputs, **options)[:, length:]
        scores = pruner.trace[0].scores
        assert torch.equal(model.generate(**prompt, visual_mask=mask, **options), expected)
        torch.testing.assert_close(pruner.trace[0].scores, scores, atol=1e-5, rtol=0)
        model.generate(**inputs, prompt_length=length - 1, **options)
        shorter = pruner.trace[0].scores
    assert (shorter - scores).abs().max() > 1e-4


def test_the_cache_of_embeddings_is_short() -> None:
    model, inputs = model_of("llava"), build_inputs("llava")
    prompt, mask = filled("llava", model, inputs)
    with attach(model, HashPolicy(), schedule=Schedule(((1, 2),))):
        cache = model(**prompt, visual_mask=mask, use_cache=True).past_key_values
    length = inputs["input_ids"].shape[1]
    assert lengths_of(cache) == [length] + [length - int(mask.sum()) + 2] * (NUM_LAYERS - 1)


def test_embeddings_of_which_nothing_is_known_warn_once() -> None:
    model, inputs = build_model("llava"), build_inputs("llava")
    prompt, _ = filled("llava", model, inputs)
    plain = model(**prompt).logits
    with attach(model, HashPolicy(), schedule=Schedule(((1, 2),))) as pruner:
        model(**inputs)
        with pytest.warns(UserWarning, match=r"nothing is pruned.*visual_mask="):
            logits = model(**prompt).logits
        assert torch.equal(logits, plain) and not pruner.trace  # not that of the prompt before
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**prompt)
            model(input_ids=torch.tensor([[1, 5, 6]]))


def test_a_static_cache_says_that_it_saves_no_memory() -> None:
    model, inputs = build_model("llava"), build_inputs("llava")
    options = {"max_new_tokens": 2, "cache_implementation": "static", "disable_compile": True}
    with (
        attach(model, HashPolicy(), schedule=Schedule(((1, 2),))),
        pytest.warns(UserWarning, match="StaticCache allocates every layer for the unpruned prompt"),
    ):
        model.generate(**inputs, **options)
