"""Every method of the registry with every family: tokens per layer, keep-all, batches, decoding, attention backends."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.agreement import kept_slots, lengths_of, model_of, single_row
from tests.models.features import ALL_FAMILIES, CLASSES, METHODS_NOT_APPLICABLE, NOT_APPLICABLE, each_method
from tests.models.generating import (
    BATCH,
    NEW_TOKENS,
    assert_same,
    expected_lengths,
    generate,
    greedy,
    inputs_of,
    pruned,
)
from tests.models.tiny_families import HIDDEN_SIZE, build_model, in_float64, visual_mask
from toprl_models import METHODS, Decision, Policy, Schedule, StageContext, TopRLPolicy, attach
from toprl_models.probe import decoder_of
from toprl_models.registry import layers_for

IMAGE_METHODS = [name for name, info in METHODS.items() if "images" in info.inputs]
METHODS_BEFORE_LLM = (
    *("visionzip", "fastervlm", "divprune", "downsample", "cdpruner", "vispruner", "holov", "prumerge_plus", "hiprune"),
    *("gprune", "tome"),
)
# of these, those whose survivors get consecutive positions
RENUMBERED = tuple(name for name in METHODS_BEFORE_LLM if name != "gprune")
# they need one query row, or a few, and the keys: no attention matrix that only one backend gives
METHODS_BY_ATTENTION = ("fastv", "fastv_progressive", "pyramiddrop", "sparsevlm", "dart", "fitprune")
# Models compute in float64: in float32 sums in another order move logits by 1e-4 without any pruning. What generate()
# returns is float32, up to about 10.
TOLERANCE = {"atol": 1e-6, "rtol": 1e-6}
# linear attention computes its state, and Llama 4 its rotation, in float32 whatever the model's dtype
RECURRENT_TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
# positions of Qwen's visual tokens are places in the image; tokens of Gemma 3's images see each other
TAKES = {family: inspect.signature(one.forward).parameters for family, one in CLASSES.items()}
PLACES = [family for family in ALL_FAMILIES if "mm_token_type_ids" in TAKES[family]]
BLOCKS = [family for family in ALL_FAMILIES if "token_type_ids" in TAKES[family]]
NUMBERS = [family for family in ALL_FAMILIES if family not in [*PLACES, *BLOCKS]]
NO_FLEX = [family for feature, family in NOT_APPLICABLE if feature == "flex_attention"]


def schedule_of(name: str, family: str, keep: float = 0.5) -> Schedule:
    """The method's stages scaled to the model; they keep ``keep`` of the tokens, its square, its cube."""
    layers = layers_for(METHODS[name], model_of(family))
    return Schedule(tuple((layer, keep ** (number + 1)) for number, layer in enumerate(layers)))


def policy_of(name: str, family: str, schedule: Schedule) -> Policy:
    """A new policy: one of the learned ones, with weights that tell tokens apart, or one with its defaults."""
    torch.manual_seed(0)
    trained = TopRLPolicy(HIDDEN_SIZE, list(schedule.layers) if name == "toprl" else [1, 2, 3], actor_size=8)
    return METHODS[name].make(schedule.layers, trained)


@functools.cache
def exact_model(family: str) -> Any:
    return in_float64(build_model(family))


def exact_inputs(family: str) -> dict[str, Tensor]:
    return {name: one.double() if one.is_floating_point() else one for name, one in inputs_of(family).items()}


def run(name: str, family: str, inputs: dict[str, Tensor] | None = None, model: Any = None) -> Any:
    """Output of a greedy generate() behind the method, with the detached pruner; in float64 by default."""
    schedule = schedule_of(name, family)
    inputs = exact_inputs(family) if inputs is None else inputs
    model = exact_model(family) if model is None else model
    return pruned(family, "compact", inputs, policy=policy_of(name, family, schedule), schedule=schedule, model=model)


def tolerance_of(family: str) -> dict[str, float]:
    kinds = getattr(model_of(family).config.get_text_config(), "layer_types", None) or ()
    return RECURRENT_TOLERANCE if "linear_attention" in kinds or family == "llama4" else TOLERANCE


@functools.cache
def batch_run(name: str, family: str) -> Any:
    return run(name, family)


@functools.cache
def plain_run(family: str) -> Any:
    return generate(exact_model(family), exact_inputs(family))


def num_visual(inputs: dict[str, Tensor]) -> list[int]:
    return visual_mask(inputs).sum(1).tolist()


def test_which_methods_prune_before_the_language_model() -> None:
    assert {name for name in IMAGE_METHODS if METHODS[name].stages == (0,)} == set(METHODS_BEFORE_LLM)
    assert {METHODS[name].make().positions for name in RENUMBERED} == {"renumbered"}


@pytest.mark.parametrize(("name", "family"), METHODS_NOT_APPLICABLE)
def test_a_method_that_does_not_apply_says_why(name: str, family: str) -> None:
    """Where ``attach`` takes a method, the matrix has tests; the other cells are here."""
    reason = METHODS_NOT_APPLICABLE[name, family]
    schedule = schedule_of(name, family)
    with pytest.raises(ValueError, match=re.escape(reason)):
        attach(model_of(family), policy_of(name, family, schedule), schedule=schedule)


@each_method()
def test_tokens_per_layer(name: str, family: str) -> None:
    """Each layer's cache holds what the method's ``counts`` say, and the user is told the sequence's length."""
    inputs, output = inputs_of(family), batch_run(name, family)
    pruner, cache = output.pruner, output.past_key_values
    found = [stage.counts for stage in pruner.trace]
    rows = [pruner.policy.counts(pruner.schedule, count) for count in num_visual(inputs)]
    expected = [tuple(row[stage] for row in rows) for stage in range(len(pruner.schedule))]
    # its counts are those of square pictures
    if name == "downsample" and family not in ("llava", "video_llava", "internvl", "idefics3", "smolvlm", "llama4"):
        assert all(0 < count <= 0.5 * there for count, there in zip(found[0], num_visual(inputs), strict=True) if there)
    else:
        assert found == expected
    assert all(count < there for count, there in zip(found[0], num_visual(inputs), strict=True) if there)
    written = NEW_TOKENS - 1
    assert lengths_of(cache) == expected_lengths(pruner, inputs, written)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + written


@each_method(every=2)
def test_keep_all_is_the_unattached_model(name: str, family: str) -> None:
    """Bitwise, in float32."""
    inputs, plain, schedule = inputs_of(family), greedy(family, "unattached"), schedule_of(name, family, keep=1.0)
    output = pruned(family, "compact", inputs, policy=policy_of(name, family, schedule), schedule=schedule)
    assert [stage.counts for stage in output.pruner.trace] == [tuple(num_visual(inputs))] * len(schedule)
    assert torch.equal(output.logits, plain.logits)
    assert torch.equal(output.tokens, plain.tokens)


@each_method(every=2)
def test_two_runs_are_equal(name: str, family: str) -> None:
    first, second = batch_run(name, family), run(name, family)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.tokens, second.tokens)
    # and pruning changed the answer, so that equality means something
    with_images = torch.tensor(num_visual(inputs_of(family))) > 0
    change = (first.logits - plain_run(family).logits)[0].abs().amax(-1)
    assert (change[with_images] > 0.1).all()
    assert (change[~with_images] < tolerance_of(family)["atol"]).all()


# random pruning draws for the whole batch at once: a row alone gets other draws
@each_method(*(name for name in IMAGE_METHODS if name != "random"))
def test_a_batch_is_its_rows(name: str, family: str) -> None:
    """Rows with one, two and no images, padded on the left, give what each of them gives alone."""
    batch, inputs = batch_run(name, family), exact_inputs(family)
    for row in range(len(BATCH)):
        alone = run(name, family, single_row(family, inputs, BATCH, row))
        if BATCH[row]:
            for one, many in zip(alone.pruner.trace, batch.pruner.trace, strict=True):
                kept = many.indices[row]
                assert one.indices[0].tolist() == kept[kept >= 0].tolist()
        torch.testing.assert_close(batch.logits[:, row], alone.logits[:, 0], **tolerance_of(family))
        assert torch.equal(batch.tokens[row], alone.tokens[0])


def decoder_arguments(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the decoder of the unattached model is called with."""
    seen: dict[str, Any] = {}
    handle = decoder_of(model).register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**inputs)
    handle.remove()
    return seen


class Spied(Policy):
    """A policy that passes on what another decides, and remembers it."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.decisions = policy, []
        self.attention_from, self.positions = policy.attention_from, policy.positions
        self.hooks, self.check, self.counts = policy.hooks, policy.check, policy.counts

    def decide(self, context: StageContext) -> Decision:
        self.decisions.append(self.policy.decide(context))
        return self.decisions[-1]


def shortened(name: str, family: str) -> tuple[Any, dict[str, Any], Tensor, Tensor]:
    """A run, the unattached decoder's arguments, the embeddings [B, N, d] behind the method and which [B, N] stay."""
    model, inputs, schedule = exact_model(family), exact_inputs(family), schedule_of(name, family)
    arguments = decoder_arguments(model, inputs)
    policy = Spied(policy_of(name, family, schedule))
    output = pruned(family, "compact", inputs, policy=policy, schedule=schedule, model=model)
    embeddings, states = arguments["inputs_embeds"].clone(), policy.decisions[0].states
    if (planes := arguments.get("deepstack_visual_embeds")) is not None:
        visual = arguments["visual_pos_masks"]
        arguments["planes"] = [
            torch.zeros_like(embeddings).masked_scatter(visual[..., None], plane) for plane in planes
        ]
    parts = (states, *policy.decisions[0].deepstack) if states is not None else ()
    for whole, part in zip((embeddings, *arguments.get("planes", ())), parts, strict=False):
        for row, visual in enumerate(visual_mask(inputs)):
            whole[row, visual] = part[row, : int(visual.sum())].to(whole.dtype)
    return output, arguments, embeddings, kept_slots(inputs, output.pruner.trace[0])


@each_method(*RENUMBERED, families=NUMBERS)
def test_before_the_llm_is_the_llm_on_fewer_embeddings(name: str, family: str) -> None:
    """The unattached language model, given by hand the embeddings that stay, with positions from 0."""
    output, _, embeddings, alive = shortened(name, family)
    for row in range(len(alive)):
        short = embeddings[row : row + 1, alive[row]]
        plain = exact_model(family).generate(
            inputs_embeds=short,
            attention_mask=torch.ones(short.shape[:2], dtype=torch.int64),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        torch.testing.assert_close(output.logits[:, row], torch.cat(plain.logits), **tolerance_of(family))
        assert torch.equal(output.tokens[row], plain.sequences[0])


def shorter_planes(arguments: dict[str, Any], row: int, alive: Tensor) -> dict[str, Any]:
    """The features that Qwen3-VL's decoder adds later, of the tokens that stay in a row."""
    if "planes" not in arguments:
        return {}
    visual = arguments["visual_pos_masks"][row] & alive
    planes = [plane[row, visual] for plane in arguments["planes"]]
    return {"visual_pos_masks": visual[alive][None], "deepstack_visual_embeds": planes}


@each_method(*RENUMBERED, families=PLACES)
def test_places_in_the_image_stay(name: str, family: str) -> None:
    """As above, with the positions that the model gave the whole prompt, Gemma 4 from 0; of its first new token."""
    model = exact_model(family)
    output, arguments, embeddings, alive = shortened(name, family)
    for row in range(len(alive)):
        short = embeddings[row : row + 1, alive[row]]
        positions = arguments["position_ids"]
        if positions.ndim == 3:  # planes of M-RoPE
            positions = positions[:, row : row + 1, alive[row]]
        else:
            positions = torch.arange(short.shape[1])[None]
        planes = shorter_planes(arguments, row, alive[row])
        states = decoder_of(model)(inputs_embeds=short, position_ids=positions, **planes).last_hidden_state
        torch.testing.assert_close(
            output.logits[0, row], model.get_output_embeddings()(states)[0, -1].float(), **tolerance_of(family)
        )


@pytest.fixture
def _uncompiled() -> Iterator[None]:
    """The compiled kernel of flex attention takes a minute to build on a CPU: torch's uncompiled one."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")
@each_method(*METHODS_BY_ATTENTION, families=[one for one in ALL_FAMILIES if one not in NO_FLEX], every=2)
def test_scores_by_attention_need_no_special_backend(name: str, family: str) -> None:
    """In float32, as eager and flex attention compute the softmax in any case."""
    expected = run(name, family, inputs_of(family), model_of(family, "sdpa"))
    for backend in ("eager", "flex_attention"):
        model = build_model(family, backend)
        output = run(name, family, inputs_of(family), model)
        assert model.config.get_text_config()._attn_implementation == backend
        for one, other in zip(output.pruner.trace, expected.pruner.trace, strict=True):
            assert torch.equal(one.indices, other.indices)
        assert_same(output, expected)


@each_method(*METHODS_BY_ATTENTION, families=NO_FLEX)
def test_scores_by_attention_under_eager(name: str, family: str) -> None:
    """As above, for the families that have no flex attention."""
    expected, output = (run(name, family, inputs_of(family), model_of(family, one)) for one in ("sdpa", "eager"))
    assert_same(output, expected)
