"""Every image-text class of transformers: exact, exact with a named limit, refused with a reason, or not a case.

``classes.json`` holds what docs/families.md says of each class; these tests compute it anew with ``verify``, whose
oracles share nothing with the pruner.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

from tests.models.tiny_families import build_inputs, build_model
from tests.models.zoo import ZOO
from toprl_models import Schedule, attach
from toprl_models.check import CLASSES_FILE
from toprl_models.methods import RandomPolicy
from toprl_models.verify import summary, verify

ROWS = (("image",), ("image", "image"), ())
STORED: dict[str, dict[str, str]] = json.loads(CLASSES_FILE.read_text()) if CLASSES_FILE.exists() else {}


def outcome_of(name: str) -> dict[str, str]:
    """Outcome and details of one class, as ``classes.json`` has them."""
    tiny = ZOO[name]
    model = build_model(tiny)
    try:
        if tiny.not_a_case:
            attach(model, RandomPolicy(), schedule=Schedule(((1, 0.5),))).detach()
        return summary(verify(model, build_inputs(tiny, ROWS)))
    except (TypeError, ValueError) as error:
        return {"outcome": "not a case" if tiny.not_a_case else "refused", "why": str(error).rpartition(": it ")[2]}


def test_the_zoo_has_every_class() -> None:
    assert {name.partition("+")[0] for name in ZOO} == set(CLASSES.values())


# one class of each structure; `make test-exhaustive` and `make feature-matrix` have all
ALWAYS = {
    "Gemma3ForConditionalGeneration": "windows, images that see each other",
    "Gemma4ForConditionalGeneration+shared_kv": "shared keys, arguments by token",
    "ChameleonForConditionalGeneration": "a decoder that makes the embeddings itself",
    "Qwen3VLMoeForConditionalGeneration": "M-RoPE, deepstack, experts",
    "Granite4VisionForConditionalGeneration": "features between the layers alone",
    "Qwen3_5ForConditionalGeneration": "linear attention",
    "Lfm2VlForConditionalGeneration": "convolutions",
    "NemotronH_Omni_Reasoning_V3": "layers without attention",
    "Llama4ForConditionalGeneration+chunks": "chunks, a complex rotary table, a decoder one level deeper",
    "Dots3NoteForConditionalGeneration": "selected keys",
    "MistralLarge4ForConditionalGeneration": "selections and keys that are shared",
    "Kimi_K25ForConditionalGeneration": "latent attention",
    "PaliGemmaForConditionalGeneration": "a prefix that sees itself",
    "LlavaForConditionalGeneration+gemma2": "a soft cap",
    "LlavaForConditionalGeneration+gpt_oss": "sinks",
    "LlavaForConditionalGeneration+gpt_neox": "a cache by another name",
    "LlavaForConditionalGeneration+stablelm": "keyword arguments that are not handed on",
    "LlavaForConditionalGeneration+mistral_with_a_window": "a window shorter than the prompt",
    "LlavaForConditionalGeneration+falcon_h1": "attention and a state in one layer",
    "Gemma3nForConditionalGeneration": "four-dimensional states",
    "Qwen4ExpForConditionalGeneration": "rotary tables of cached tokens",
    "UnlimitedOcrForConditionalGeneration": "a cache that the model brings",
    "Kosmos2_5ForConditionalGeneration": "no placeholder id",
    "InstructBlipForConditionalGeneration": "a generate() of its own",
    "MllamaForConditionalGeneration": "cross-attention",
    "T5Gemma2ForConditionalGeneration": "an encoder-decoder",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.exhaustive) for name in sorted(ZOO)]
)
def test_a_class_does_what_the_table_says(name: str) -> None:
    assert outcome_of(name) == STORED[name], "run make feature-matrix"


def test_enough_classes_are_exact() -> None:
    counts = Counter(STORED[name]["outcome"] for name in CLASSES.values())
    assert set(counts) <= {"exact", "exact with limits", "refused", "not a case"}
    assert counts["exact"] + counts["exact with limits"] >= 60


def test_a_wrong_pruner_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pruner that drops other tokens than its trace says is wrong in every check that removes any."""
    from toprl_models.runtime import compact

    gather = compact.prune_stage

    def one_off(hidden_states: torch.Tensor, scores: torch.Tensor, *args, **kwargs):
        return gather(hidden_states.roll(1, 1), scores, *args, **kwargs)

    monkeypatch.setattr(compact, "prune_stage", one_off)
    findings = {finding.check: finding.outcome for finding in verify(build_model("llava"), build_inputs("llava", ROWS))}
    assert findings["compact = tokens cut out by hand"] == findings["mask mode = compact mode"] == "wrong"
    assert findings["answer = answer in the prompt"] == "wrong"
    assert findings["keep-all = unattached"] == findings["cache lengths"] == "exact"


if __name__ == "__main__":  # python -m tests.models.test_every_class: compute classes.json
    CLASSES_FILE.write_text(json.dumps({name: outcome_of(name) for name in sorted(ZOO)}, indent=1) + "\n")
