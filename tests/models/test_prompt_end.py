"""A policy never sees the answer: what is kept depends on the prompt, however the answer comes into a forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.models.agreement import fitting, model_of
from tests.models.conftest import HashPolicy
from tests.models.features import feature
from tests.models.generating import BATCH, generate, inputs_of, with_answer
from tests.models.tiny_families import HIDDEN_SIZE, IMAGE_ID, VIDEO_ID, build_inputs, build_model
from toprl_models import FastV, OneShot, PyramidDrop, RandomPolicy, Schedule, SparseVLM, TopRLPolicy, attach

WORDS = ((20, 21, 22), (33, 34, 35))
SINGLE = (("image",),)


def conditioned(layer: int = 3) -> OneShot:
    torch.manual_seed(0)
    return OneShot(TopRLPolicy(HIDDEN_SIZE, [layer], 8, condition_on="text"), layer)


READERS = {"fastv": FastV, "pyramiddrop": PyramidDrop, "sparsevlm": SparseVLM, "toprl_text": conditioned}
readers = pytest.mark.parametrize("reader", READERS)


def schedule(keep: int = 4) -> Schedule:
    return Schedule(((3, keep),))


def labels_of(inputs: dict[str, Tensor], length: int) -> Tensor:
    """Label what comes after ``length`` slots."""
    labels = inputs["input_ids"].clone()
    labels[:, :length] = -100
    return labels


def kept(model: Any, inputs: dict[str, Tensor], reader: str, **told: Any) -> tuple[Tensor, Tensor]:
    with attach(model, READERS[reader](), schedule=schedule()) as pruner:
        model(**inputs, **told)
    return pruner.trace[0].indices, pruner.trace[0].scores


@feature("answer in the forward pass")
@readers
def test_scoring_an_answer_is_generating_it(family: str, reader: str) -> None:
    """The answer's log-probabilities in one pass with labels are those of the steps that generated it."""
    model, inputs = model_of(family), inputs_of(family)
    length = inputs["input_ids"].shape[1]
    where = fitting(model, PyramidDrop(), schedule())  # before a layer with attention
    make = (lambda: conditioned(*where.layers)) if reader == "toprl_text" else READERS[reader]
    with attach(model, make(), schedule=where):
        output = generate(model, inputs, suppress_tokens=[IMAGE_ID, VIDEO_ID])
        longer = with_answer(inputs, output.tokens)
        scored = model(**longer, labels=labels_of(longer, length)).logits[:, length - 1 : -1]
    log_probs = [
        logits.log_softmax(-1).gather(2, output.tokens[..., None])[..., 0]
        for logits in (output.logits.transpose(0, 1), scored)
    ]
    torch.testing.assert_close(*log_probs, atol=1e-4, rtol=0)
    plain = model(**longer).logits[:, length - 1 : -1].log_softmax(-1).gather(2, output.tokens[..., None])[..., 0]
    assert (plain - log_probs[0])[:2].abs().max() > 0.1  # pruning matters


@readers
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_each_source_tells_the_same_end(family: str, reader: str) -> None:
    model, inputs = model_of(family), build_inputs(family, BATCH)
    length = inputs["input_ids"].shape[1]
    indices, scores = kept(model, inputs, reader)
    shifted = labels_of(with_answer(inputs, WORDS[0]), length).roll(-1, 1)
    for words in WORDS:
        longer = with_answer(inputs, words)
        for told in (
            {"labels": labels_of(longer, length)},
            {"shift_labels": shifted, "labels": None},
            {"prompt_length": length},
            {"prompt_length": torch.full((3,), length)},
            {"prompt_length": length, "labels": labels_of(longer, length + 1)},  # the explicit length goes first
        ):
            again, same = kept(model, longer, reader, **told)
            assert torch.equal(again, indices), told
            torch.testing.assert_close(same, scores, atol=2e-6, rtol=0)  # rounding of sums over other lengths
        with attach(model, READERS[reader](), schedule=schedule()) as pruner, pruner.prompt_length(length):
            model(**longer)
            model.base_model(**longer)
        torch.testing.assert_close(pruner.trace[0].scores, scores, atol=2e-6, rtol=0)
    # the check can fail: without a source the answer is taken for the question
    assert (kept(model, with_answer(inputs, WORDS[0]), reader)[1] - scores).abs().max() > 1e-4


def test_every_row_has_its_own_end() -> None:
    """Right-padded rows whose prompts differ in length."""
    model = model_of("llava")
    inputs = build_inputs("llava", (("image",), ("image", "image")), padding_side="right")
    lengths = inputs["attention_mask"].sum(1)
    longer = with_answer(inputs, WORDS[0])
    for row, length in enumerate(lengths.tolist()):  # answers follow their prompts, padding follows the answers
        longer["input_ids"][row, length : length + 3] = torch.tensor(WORDS[0])
        longer["attention_mask"][row] = (torch.arange(longer["input_ids"].shape[1]) < length + 3).long()
    labels = labels_of(longer, 0)
    for row, length in enumerate(lengths.tolist()):
        labels[row, :length] = labels[row, length + 3 :] = -100
    scores = kept(model, inputs, "fastv")[1]
    for told in ({"labels": labels}, {"prompt_length": lengths}):
        torch.testing.assert_close(kept(model, longer, "fastv", **told)[1], scores, atol=1e-6, rtol=0)


@readers
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_onevision"])
def test_without_a_cache_the_decision_of_the_prompt_stays(family: str, reader: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    with attach(model, READERS[reader](), schedule=schedule()):
        cached, uncached = (
            generate(model, inputs, use_cache=use_cache, suppress_tokens=[IMAGE_ID, VIDEO_ID])
            for use_cache in (True, False)
        )
    assert torch.equal(cached.tokens, uncached.tokens)
    # products of other shapes are rounded otherwise; how far depends on the machine (1.2e-4 was seen)
    torch.testing.assert_close(cached.logits, uncached.logits, atol=3e-4, rtol=0)


def test_a_drawn_decision_stays_too() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    outputs = []
    for use_cache in (True, False):
        with attach(model, RandomPolicy(3), schedule=schedule()):
            outputs.append(generate(model, inputs, use_cache=use_cache).tokens)
    assert torch.equal(*outputs)


def test_beams_that_were_pruned_differently_need_a_cache() -> None:
    model, inputs = model_of("llava"), build_inputs("llava", SINGLE)
    with attach(model, HashPolicy(), schedule=schedule()):
        cached, uncached = (generate(model, inputs, use_cache=use, num_beams=2).tokens for use in (True, False))
    assert torch.equal(cached, uncached)
    with (
        attach(model, RandomPolicy(), schedule=schedule()),
        pytest.raises(ValueError, match=r"num_beams=2.*use a cache"),
    ):
        generate(model, inputs, use_cache=False, num_beams=2)


@readers
def test_logits_to_keep_says_nothing(reader: str) -> None:
    model, inputs = model_of("llava"), build_inputs("llava", SINGLE)
    scores = kept(model, inputs, reader)[1]
    cache = DynamicCache(config=model.config.get_text_config())
    for told in ({"logits_to_keep": 3}, {"logits_to_keep": 3, "past_key_values": cache}):
        assert torch.equal(kept(model, inputs, reader, **told)[1], scores)


@readers
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_draft_is_no_prompt(family: str, reader: str) -> None:
    """Assisted decoding hands the prompt over together with a draft."""
    model, inputs = model_of(family), build_inputs(family, SINGLE)
    with attach(model, READERS[reader](), schedule=schedule()) as pruner:
        plain = generate(model, inputs)
        scores = pruner.trace[0].scores
        drafted = generate(model, inputs, prompt_lookup_num_tokens=2)
        torch.testing.assert_close(pruner.trace[0].scores, scores, atol=2e-6, rtol=0)
    assert torch.equal(plain.tokens, drafted.tokens)


def test_labels_that_leave_no_question_are_refused_for_readers_alone() -> None:
    model, inputs = model_of("llava"), build_inputs("llava", SINGLE)
    with (
        attach(model, FastV(), schedule=schedule()),
        pytest.raises(ValueError, match=r"its end is that of labels.*prompt_length="),
    ):
        model(**inputs, labels=inputs["input_ids"])
    with attach(model, HashPolicy(), schedule=schedule()) as pruner:
        model(**inputs, labels=inputs["input_ids"])
    assert pruner.trace[0].counts == (4,)


@pytest.mark.parametrize("name", ["visual_mask", "labels"])
def test_another_shape_is_refused(name: str) -> None:
    model, inputs = model_of("llava"), build_inputs("llava", SINGLE)
    with attach(model, HashPolicy(), schedule=schedule()), pytest.raises(ValueError, match=rf"{name}: shape \(1, 3\)"):
        model(**inputs, **{name: torch.ones(1, 3, dtype=torch.long)})


@pytest.mark.parametrize("order", ["pruner first", "PEFT first"])
def test_fine_tuning_with_peft_keeps_what_generation_keeps(order: str) -> None:
    """PEFT calls the model's method forward(), past its hooks."""
    peft = pytest.importorskip("peft")
    model, inputs = build_model("llava"), build_inputs("llava", SINGLE)
    length = inputs["input_ids"].shape[1]
    scores = kept(model, inputs, "fastv")[1]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True)
    wrapped = peft.get_peft_model(model, config) if order == "PEFT first" else None
    with attach(model, FastV(), schedule=schedule()) as pruner:
        wrapped = peft.get_peft_model(model, config) if wrapped is None else wrapped
        longer = with_answer(inputs, WORDS[0])
        wrapped(**longer, labels=labels_of(longer, length)).loss.backward()
        torch.testing.assert_close(pruner.trace[0].scores, scores, atol=2e-6, rtol=0)
        with pruner.prompt_length(length):
            wrapped(**longer)
        torch.testing.assert_close(pruner.trace[0].scores, scores, atol=2e-6, rtol=0)


def test_guidance_prunes_the_prompt_and_not_the_negative_one() -> None:
    """The negative prompt has no image; keep-all is the unattached model, and both modes agree."""
    model, inputs = model_of("llava"), build_inputs("llava", SINGLE)
    negative = {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[1, 30, 31]])}
    plain = generate(model, inputs, **negative)
    outputs = {}
    for mode, keep in (("compact", 1.0), ("compact", 4), ("mask", 4)):
        with attach(model, HashPolicy(), schedule=Schedule(((3, keep),)), mode=mode):
            outputs[mode, keep] = generate(model, inputs, **negative)
    assert torch.equal(outputs["compact", 1.0].logits, plain.logits)
    torch.testing.assert_close(outputs["compact", 4].logits, outputs["mask", 4].logits, atol=1e-4, rtol=0)
    assert (outputs["compact", 4].logits - plain.logits).abs().max() > 0.1


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused(name: str) -> None:
    model = model_of("llava")
    with attach(model, HashPolicy(), schedule=schedule()), pytest.raises(ValueError, match="continuous batching"):
        getattr(model, name)([[1, 5, 6]])
    assert name not in vars(model)


def test_the_model_has_its_own_methods_back() -> None:
    model = model_of("llava")
    before = dict(vars(model))
    with attach(model, HashPolicy(), schedule=schedule()):
        assert {"forward", "generate"} <= set(vars(model))
    assert dict(vars(model)) == before


@pytest.mark.parametrize("extra", [0, 9])
def test_a_filled_cache_needs_the_new_ids_alone(extra: int) -> None:
    """Whether they are longer than the cache or not."""
    model, inputs = model_of("llava"), build_inputs("llava", SINGLE)
    if extra:
        inputs = with_answer(inputs, torch.arange(20, 20 + extra))
    first = torch.tensor([[1, *range(30, 59)]]) if not extra else torch.tensor([[1, 30, 31]])
    whole = inputs | {"input_ids": torch.cat([first, inputs["input_ids"]], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    outputs = []
    with attach(model, FastV(), schedule=schedule()) as pruner:
        for ids in (whole["input_ids"], inputs["input_ids"]):
            cache = model(input_ids=first, use_cache=True).past_key_values
            output = model.generate(**whole | {"input_ids": ids}, past_key_values=cache, max_new_tokens=3)
            outputs.append((output[:, -3:], pruner.trace[0].indices))
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])


def test_a_length_for_each_row_goes_with_beams() -> None:
    model, inputs = model_of("llava"), build_inputs("llava", (("image",), ("image",)))
    lengths = torch.full((2,), inputs["input_ids"].shape[1])
    with attach(model, FastV(), schedule=schedule()) as pruner:
        plain = model.generate(**inputs, num_beams=2, max_new_tokens=3)
        with pruner.prompt_length(lengths):
            assert torch.equal(model.generate(**inputs, num_beams=2, max_new_tokens=3), plain)
        assert torch.equal(model.generate(**inputs, num_beams=2, max_new_tokens=3, prompt_length=lengths), plain)


def test_keep_all_in_mask_mode_has_the_models_own_loss() -> None:
    model, inputs = model_of("llava"), build_inputs("llava", (("image",), ("image", "image")))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    plain = model(**inputs, labels=labels).loss
    for mode in ("compact", "mask"):
        with attach(model, HashPolicy(), schedule=schedule(1000), mode=mode):
            torch.testing.assert_close(model(**inputs, labels=labels).loss, plain, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_has_the_eager_loss() -> None:
    """Labels predicted from dropped tokens do not count there either, whatever an earlier pass had dropped."""
    model, inputs = build_model("llava"), build_inputs("llava", SINGLE)
    labels = labels_of(inputs, int((inputs["input_ids"][0] == IMAGE_ID).nonzero().max()) + 1)
    torch._dynamo.reset()
    with attach(model, HashPolicy(), schedule=schedule(1)):
        expected = model(**inputs, labels=labels).loss
        compiled = torch.compile(model, backend="eager")
        model(**build_inputs("llava", (("image", "image"),)))
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs, labels=labels).loss, expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
