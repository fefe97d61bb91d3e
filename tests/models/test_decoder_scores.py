"""Decoder classes inside a LLaVA: scores, compact and mask mode by hand, and the table in docs/models.md.

Each cell of the table is "exact", "refused" (a ValueError that names the class) or, where it depends on the layer,
"exact or refused"; a test that measures another cell than the page shows fails.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.models.agreement import ATOL, MIXED, generate, kept_slots, masked_by_hand, single_row
from tests.models.conftest import HashPolicy
from tests.models.tiny_families import IMAGE_ID, PAD_ID, build_inputs, clip_config, text_config, visual_mask
from toprl_models import FastV, Policy, PyramidDrop, Schedule, attach
from toprl_models.probe import decoder_of
from toprl_models.runtime.guards import refuse_recurrent

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
HEADING = "## Decoders inside a LLaVA"
TOLERANCE = 1e-5  # float32 sums of at most 1
SCHEDULE = Schedule(((3, 0.5), (5, 0.25)))
HEAD = {"head_dim": 16}
MIXED_LAYERS = {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 4096}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA4 = {
    **HEAD,
    "num_local_experts": 2,
    "intermediate_size_mlp": 64,
    "no_rope_layers": [1, 1, 1, 0, 1, 1],
    "attn_temperature_tuning": True,
    "attn_scale": 0.5,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
# by the name in the table: the class of the config, and what differs from the tiny Llama
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    "Mistral": ("MistralConfig", {"sliding_window": None}),
    "Granite": ("GraniteConfig", {"attention_multiplier": 0.5}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", HEAD),
    "Qwen2-MoE": ("Qwen2MoeConfig", {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS}),
    "SmolLM3": ("SmolLM3Config", {}),
    "Cohere": ("CohereConfig", {}),
    "Cohere 2": ("Cohere2Config", MIXED_LAYERS),
    "Gemma": ("GemmaConfig", HEAD),
    "Gemma 2": ("Gemma2Config", {"attn_logit_softcapping": 2.0, **HEAD, **MIXED_LAYERS}),
    "Gemma 3 text": ("Gemma3TextConfig", HEAD | MIXED_LAYERS),
    "Llama 4 text": ("Llama4TextConfig", LLAMA4),
    "Helium": ("HeliumConfig", HEAD),
    "GLM-4": ("Glm4Config", HEAD),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, **LATENT, **EXPERTS},
    ),
    "LFM2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 3}),
    "Phi-3": ("Phi3Config", {}),
    "Phi": ("PhiConfig", {}),
    "OLMo 2": ("Olmo2Config", {}),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, **HEAD, **MIXED_LAYERS}),
}
decoders = pytest.mark.parametrize("name", list(DECODERS))


def llava_of(config: str, changes: dict[str, Any]) -> Any:
    """Build a tiny LLaVA around a text decoder; eager."""
    torch.manual_seed(0)
    vision = {key: value for key, value in clip_config().items() if key != "model_type"}
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision),
            text_config=getattr(transformers, config)(**text_config(**changes)),
            image_token_id=IMAGE_ID,
            vision_feature_layer=-1,
        )
    )
    model.eval().requires_grad_(False)
    model.set_attn_implementation({"text_config": "eager"})
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD_ID
    return model


@functools.cache
def model_of(name: str) -> Any:
    return llava_of(*DECODERS[name])


def is_recurrent(model: Any) -> bool:
    return "conv" in (getattr(model.get_decoder().config, "layer_types", None) or ())


@functools.cache
def page_cells() -> dict[str, list[str]]:
    """Read the table: cells by the name in the first column."""
    section = PAGE.read_text().split(HEADING + "\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


def outcome(model: Any, check: Callable[[], None]) -> str:
    """Run a check that asserts exactness: "exact", or "refused" by a ValueError that names a class of the decoder."""
    try:
        check()
    except ValueError as error:
        kinds = {type(module).__name__ for module in decoder_of(model).modules()}
        if not any(f"{kind} " in str(error) for kind in kinds):
            raise
        return "refused"
    return "exact"


# --- scores ---


def prompts(model: Any) -> list[tuple[dict[str, Tensor], dict[str, Tensor], Callable[[], dict[str, Any]]]]:
    """List one row, a batch and a second turn: inputs, what replaces some of them, and a function that makes the cache.

    A recurrent layer takes no padding between two turns.
    """
    rows = (("image",),) if is_recurrent(model) else MIXED
    batch, second = build_inputs("llava", rows), build_inputs("llava", rows, seed=1)

    def first_turn() -> dict[str, Any]:
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        model(**batch, past_key_values=cache)
        return {"past_key_values": cache}

    both = torch.cat([batch["attention_mask"], second["attention_mask"]], 1)
    return [
        (build_inputs("llava"), {}, dict),
        (build_inputs("llava", MIXED), {}, dict),
        (second, {"attention_mask": both}, first_turn),
    ]


def assert_scores(model: Any, policy: Policy, layer: int, source: int) -> None:
    """Compare with the unattached model's own weights of layer ``source``: head mean, last row, visual columns."""
    kinds = getattr(model.get_decoder().config, "layer_types", None) or ["full_attention"] * 6
    if policy.attention_from == "previous" and kinds[source] == "conv":
        source -= 1  # the last attention layer before the stage
    source = sum(kind != "conv" for kind in kinds[:source])  # transformers lists the weights of attention layers alone
    for inputs, more, first_turn in prompts(model):
        arguments, visual = inputs | more, visual_mask(inputs)
        attention = model(**arguments, **first_turn(), output_attentions=True).attentions[source]
        expected = attention.mean(1)[:, -1, -visual.shape[1] :]
        kept = []
        # sdpa has no soft cap: recent releases of transformers refuse it, older ones leave it out
        caps = getattr(model.get_decoder().config, "attn_logit_softcapping", None) is not None
        backends = ("eager", "sdpa") if model.get_decoder()._supports_sdpa and not caps else ("eager",)
        for backend in backends:
            model.set_attn_implementation({"text_config": backend})
            try:
                turn = first_turn()
                with attach(model, policy, schedule=Schedule(((layer, 0.5),))) as pruner:
                    model(**arguments, **turn)
            finally:
                model.set_attn_implementation({"text_config": "eager"})
            trace = pruner.trace[0]
            kept.append(trace.indices)
            for row, seen in enumerate(visual):
                scores = trace.scores[row][trace.visual_index[row] >= 0]
                torch.testing.assert_close(scores, expected[row][seen], atol=TOLERANCE, rtol=0)
        assert torch.equal(kept[0], kept[-1])
        for row, seen, indices in zip(expected, visual, kept[0], strict=True):
            best = row[seen].sort(descending=True, stable=True).indices[: int(seen.sum()) // 2]
            assert indices[indices >= 0].tolist() == sorted(best.tolist())


@decoders
@pytest.mark.parametrize(("column", "policy", "lag"), [(0, FastV(), 1), (1, PyramidDrop(positions="original"), 0)])
def test_scores_are_the_models_own_attention(name: str, column: int, policy: Policy, lag: int) -> None:
    """At two layers, so that a decoder with two kinds of layers shows both."""
    model = model_of(name)
    checks = [functools.partial(assert_scores, model, policy, layer, layer - lag) for layer in (3, 4)]
    cells = {outcome(model, check) for check in checks}
    assert page_cells()[name][column] == " or ".join(sorted(cells))


# --- modes ---


def cut_by_hand(model: Any, inputs: dict[str, Tensor], stages: list[tuple[int, Tensor]]) -> Tensor:
    """Run one prompt; before a stage's layer all slots but those in ``keep``, bool [N], are cut out: logits [m, W]."""
    decoder = decoder_of(model)

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], index: int) -> tuple[tuple, dict[str, Any]]:
        keeps = [keep for layer, keep in stages if layer <= index]
        if not keeps:
            return args, kwargs
        before = next((keep for layer, keep in reversed(stages) if layer < index), torch.ones_like(keeps[-1]))
        keep, tables, mask = keeps[-1], kwargs["position_embeddings"], kwargs["attention_mask"]
        states = args[0][:, keep[before]]
        tables = tables[:, keep] if isinstance(tables, Tensor) else tuple(table[:, keep] for table in tables)
        mask = None if mask is None else mask[..., keep, :][..., keep]
        return (states,), kwargs | {"position_embeddings": tables, "attention_mask": mask}

    handles = [
        layer.register_forward_pre_hook(functools.partial(hook, index=index), with_kwargs=True)
        for index, layer in enumerate(decoder.layers)
    ]
    try:
        return model.lm_head(model.base_model(**inputs, use_cache=False).last_hidden_state)[0]
    finally:
        for handle in handles:
            handle.remove()


def assert_cut_by_hand(model: Any, schedule: Schedule) -> None:
    """Compare rows of a padded batch, and each step of their answers, with the tokens of each row cut out by hand."""
    batch = build_inputs("llava", MIXED)
    with attach(model, HashPolicy(), schedule=schedule) as pruner:
        # by hand an image id would stand for a fourth image
        answer = generate(model, batch, max_new_tokens=3, suppress_tokens=[IMAGE_ID])
        trace = pruner.trace
        logits = model(**batch).logits
    words = answer.sequences[:, batch["input_ids"].shape[1] :]
    for row in range(2):
        alone = single_row("llava", batch, MIXED, row)
        visual = visual_mask(alone)[0].nonzero().flatten()
        stages = []
        for stage in trace:
            keep = ~visual_mask(alone)[0]
            keep[visual[stage.indices[row][stage.indices[row] >= 0]]] = True
            stages.append((stage.layer, torch.cat([keep, torch.ones(words.shape[1], dtype=torch.bool)])))
        ids = torch.cat([alone["input_ids"], words[row : row + 1]], 1)
        whole = alone | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = cut_by_hand(model, whole, stages)
        kept = kept_slots(batch, trace[-1])[row]
        torch.testing.assert_close(logits[row][kept], expected[: int(kept.sum())], atol=ATOL, rtol=1e-4)
        steps = torch.stack(answer.logits, 1)[row]
        torch.testing.assert_close(steps, expected[-1 - len(steps) : -1], atol=ATOL, rtol=1e-4)


def assert_masked_by_hand(model: Any, mode: str) -> None:
    """Compare surviving rows of a padded batch with Eqs. 6-7 in the model's own masks."""
    inputs = build_inputs("llava", MIXED)
    plain = model.base_model(**inputs).last_hidden_state
    with attach(model, HashPolicy(), schedule=SCHEDULE, mode=mode) as pruner:
        states = model.base_model(**inputs).last_hidden_state
    expected, alive = masked_by_hand(model, inputs, pruner.trace), kept_slots(inputs, pruner.trace[-1])
    torch.testing.assert_close(states[alive], expected[alive], atol=ATOL, rtol=1e-4)
    assert (plain - expected)[alive].abs().max() > 0.1  # it could not fail if nothing was pruned


@decoders
def test_compact_mode(name: str) -> None:
    model = model_of(name)

    def check() -> None:
        assert_cut_by_hand(model, SCHEDULE)
        if not is_recurrent(model):
            assert_masked_by_hand(model, "compact")

    assert page_cells()[name][2] == outcome(model, check)


@decoders
def test_mask_mode(name: str) -> None:
    model = model_of(name)
    assert page_cells()[name][3] == outcome(model, lambda: assert_masked_by_hand(model, "mask"))


def test_the_page_lists_each_decoder() -> None:
    assert list(page_cells()) == list(DECODERS)


# --- kinds of layers ---


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_stage_around_the_first_attention_layer(layer: int) -> None:
    """The first layer of LFM2 is a convolution, whose cache has no length: that of layer 1 tells the sequence's."""
    assert_cut_by_hand(model_of("LFM2"), Schedule(((layer, 0.5), (layer + 1, 0.25))))


@pytest.mark.parametrize(("policy", "layer"), [(FastV(), 1), (PyramidDrop(positions="original"), 4)])
def test_a_convolution_has_no_scores(policy: Policy, layer: int) -> None:
    with pytest.raises(ValueError, match=r"Lfm2DecoderLayer has no single softmax attention .* cannot be supported"):
        attach(model_of("LFM2"), policy, schedule=Schedule(((layer, 0.5),)))


def test_a_convolution_cannot_be_masked() -> None:
    model = model_of("LFM2")
    with pytest.raises(ValueError, match=r"Lfm2DecoderLayer \(decoder layer 4\) keeps a state"):
        attach(model, HashPolicy(), schedule=Schedule(((3, 0.5),)), mode="mask")


def test_attention_beside_a_recurrence_is_refused() -> None:
    class Both(nn.Module):
        def forward(self, states: Tensor, cache: Any) -> Any:
            return ALL_ATTENTION_FUNCTIONS(states) + cache.update_conv_state(states)

    for mode in ("compact", "mask"):
        with pytest.raises(ValueError, match=r"Both \(decoder layer 0\) keeps a state .* this decoder$"):
            refuse_recurrent(nn.ModuleList([Both()]), 0, mode)


def test_temperature_of_slots_is_refused() -> None:
    """Layer 3 of this Llama 4 scales its queries by slot, which on a shortened sequence is no position."""
    model, inputs = llava_of("Llama4TextConfig", LLAMA4 | {"floor_scale": 4}), build_inputs("llava", MIXED)
    with (
        attach(model, HashPolicy(), schedule=SCHEDULE),
        pytest.raises(RuntimeError, match=r"floor_scale=4: .* mode=\"compact\" does not support \(the sequence has 45"),
    ):
        model(**inputs)
    assert_masked_by_hand(model, "mask")
    assert_scores(model, FastV(), 4, 3)  # the sequence is not shortened in layer 3


def test_padding_of_an_earlier_turn_with_a_stage_at_layer_0() -> None:
    """Tokens that are removed before layer 0 are padding of the unattached model; an earlier turn has its own."""
    model = model_of("Llama")
    second, more, first_turn = prompts(model)[2]
    turn = first_turn()
    with attach(model, HashPolicy(), schedule=Schedule(((0, 0.5),))) as pruner:
        logits = model(**second | more, **turn).logits
    alive = kept_slots(second, pruner.trace[0])
    past = more["attention_mask"].shape[1] - alive.shape[1]
    mask = torch.cat([more["attention_mask"][:, :past], alive.long()], 1)
    expected = model(**second | {"attention_mask": mask}, **first_turn()).logits
    torch.testing.assert_close(logits[alive], expected[alive], atol=ATOL, rtol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "LFM2"])
@pytest.mark.parametrize("layer", [0, 1, 4])
def test_second_turn_is_both_turns_with_tokens_cut_out(name: str, layer: int) -> None:
    """The last word is given without positions: the model reads the sequence's length from the cache."""
    model, word = model_of(name), torch.tensor([[5]])
    first, second = build_inputs("llava"), build_inputs("llava", seed=1)
    cache = model(**first).past_key_values
    with attach(model, HashPolicy(), schedule=Schedule(((layer, 0.5), (layer + 1, 0.25)))) as pruner:
        logits = model(input_ids=second["input_ids"], pixel_values=second["pixel_values"], past_key_values=cache).logits
        step = model(input_ids=word, past_key_values=cache).logits
        trace = pruner.trace
    length, last = first["input_ids"].shape[1], torch.ones(1, dtype=torch.bool)
    keeps = [kept_slots(second, stage)[0] for stage in trace]
    stages = [
        (stage.layer, torch.cat([last.expand(length), keep, last])) for stage, keep in zip(trace, keeps, strict=True)
    ]
    ids = torch.cat([first["input_ids"], second["input_ids"], word], 1)
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
    expected = cut_by_hand(model, {"input_ids": ids, "pixel_values": pixels}, stages)[length:]
    torch.testing.assert_close(torch.cat([logits[0][keeps[-1]], step[0]]), expected, atol=ATOL, rtol=1e-4)


def test_padding_between_turns_of_a_convolution_is_refused() -> None:
    model, inputs = model_of("LFM2"), build_inputs("llava", MIXED)
    cache = model(**inputs).past_key_values
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"]] * 2, 1)
    with (
        attach(model, HashPolicy(), schedule=Schedule(((3, 0.5),))),
        pytest.raises(ValueError, match=r"Lfm2DecoderLayer \(decoder layer 4\) keeps a state of earlier turns"),
    ):
        model(**inputs, past_key_values=cache)
