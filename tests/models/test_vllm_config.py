"""What the plug-in for vLLM reads, refuses and counts, without vLLM (tests/vllm/ has the rest)."""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.models.tiny_families import build_model
from toprl_models import DivPrune, FasterVLM, Policy, RandomPolicy, Schedule, TopRLPolicy, attach, tiny
from toprl_models.integrations.vllm.options import (
    ARCHITECTURES,
    VARIABLE,
    PruningOptions,
    check_version,
    options_of,
    possible,
    why_not,
    why_not_inside,
)
from toprl_models.integrations.vllm.placeholders import Gap, from_columns, full_places, shorten, to_columns
from toprl_models.integrations.vllm.pruning import ImagePruning
from toprl_models.methods.toprl import model_signature

ROOT = Path(__file__).parents[2]


def policy_folder(folder: Path, model, stages: list[int], **options) -> str:
    torch.manual_seed(0)
    width = model.config.get_text_config().hidden_size
    TopRLPolicy(width, stages, 16, model_signature(model), **options).save_pretrained(folder)
    return str(folder)


# --- options ---


def test_options_are_read():
    assert PruningOptions.read({"method": "divprune", "keep": 0.25}) == PruningOptions("divprune", 0.25)
    assert PruningOptions.read({"policy": "runs/ocr/policy", "keep": 16}) == PruningOptions(
        "toprl", 16, "runs/ocr/policy"
    )


def test_stages_are_read():
    told = {"method": "fastv", "stages": [[2, 0.5], [8, 64]]}
    options = PruningOptions.read(told)
    assert options == PruningOptions("fastv", None, None, ((2, 0.5), (8, 64)))
    assert options.schedule == Schedule(((2, 0.5), (8, 64)))
    config = SimpleNamespace(toprl={**asdict(options), "digest": options.digest})
    assert PruningOptions.stored_in(config) == options
    assert options.digest != PruningOptions.read({**told, "stages": [[2, 0.5], [8, 63]]}).digest
    assert options.describe("X") == "fastv keeps 0.5 before layer 2, 64 before layer 8 of a prompt's visual tokens in X"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("divprune", "toprl='divprune' must be a JSON object such as"),
        ({"keep": 0.5}, 'method is missing; give "method": NAME .*toprl, fastv'),
        ({"method": "divprunes", "keep": 0.5}, "method 'divprunes' is unknown; known methods: toprl, fastv"),
        ({"method": "divprune", "keeps": 0.5}, "'keeps' is unknown; the options are method, keep, policy, stages"),
        ({"method": "divprune"}, "keep is missing; give"),
        ({"method": "divprune", "keep": 0}, "keep=0 must be"),
        ({"method": "divprune", "keep": 1.5}, "keep=1.5 must be"),
        ({"method": "divprune", "keep": float("nan")}, "keep=nan must be"),
        ({"method": "divprune", "keep": True}, "keep=True must be"),
        ({"method": "divprune", "keep": "0.5"}, "keep='0.5' must be"),
        ({"method": "divprune", "policy": "x", "keep": 0.5}, "method='divprune' takes no policy"),
        ({"method": "toprl", "keep": 0.5}, "method='toprl' needs a trained policy"),
        ({"policy": 3, "keep": 0.5}, "policy=3 must be a string"),
        ({"method": "fastv", "keep": 0.5, "stages": [[2, 0.5]]}, "keep is for pruning before .* leave one out"),
        ({"method": "fastv", "stages": []}, r"stages=\[\] must be \"stages\": .*stages=\(\) is empty"),
        ({"method": "fastv", "stages": [2, 0.5]}, r"stages=\[2, 0.5\] must be"),
        ({"method": "fastv", "stages": [[2, 0.5, 1]]}, "must be"),
        ({"method": "fastv", "stages": [[8, 0.5], [2, 0.2]]}, "layers ascend"),
        ({"method": "fastv", "stages": [[2, "0.5"]]}, "keep '0.5' at layer 2 must be an int"),
    ],
)
def test_wrong_options(given, message):
    with pytest.raises(ValueError, match=message):
        PruningOptions.read(given)


def test_where_options_come_from(monkeypatch):
    told = {"toprl": {"method": "divprune", "keep": 0.5}}
    monkeypatch.delenv(VARIABLE, raising=False)
    assert options_of({}) is None and options_of(None) is None and options_of({"other": 1}) is None
    assert options_of(told) == PruningOptions("divprune", 0.5)
    monkeypatch.setenv(VARIABLE, json.dumps(told["toprl"]))
    assert options_of({}) == options_of(told) == PruningOptions("divprune", 0.5)
    monkeypatch.setenv(VARIABLE, json.dumps({"method": "random", "keep": 0.5}))
    with pytest.raises(ValueError, match=f"additional_config says .*divprune.*{VARIABLE} says .*random.*unset one"):
        options_of(told)
    monkeypatch.setenv(VARIABLE, "divprune")
    with pytest.raises(ValueError, match=f"{VARIABLE}=divprune: .*; give JSON such as"):
        options_of({})


def test_versions():
    for version in ("0.31.0", "0.32.0", "0.32.1", "0.32.0+cpu", "0.32.1.dev3+g123"):
        check_version(version)
    for version in ("0.30.2", "0.33.0", "1.0"):
        with pytest.raises(ValueError, match=rf"vLLM {version} is installed, .*pip install 'vllm~=0.32.0'"):
            check_version(version)


def test_counts():
    assert [PruningOptions("random", 0.25).count(n) for n in (576, 2, 1, 0)] == [144, 1, 1, 0]
    assert [PruningOptions("random", 16).count(n) for n in (576, 16, 3)] == [16, 16, 3]


def test_the_digest_knows_what_decides(tmp_path):
    model = tiny.load()[0]
    folder = policy_folder(tmp_path / "policy", model, [0])
    mine = tmp_path / "mine.py"
    mine.write_text("from toprl_models import Policy\nclass Mine(Policy):\n    uses_text = False\n")
    options = [
        PruningOptions("divprune", 0.5),
        PruningOptions("divprune", 0.25),
        PruningOptions("random", 0.5),
        PruningOptions("toprl", 0.5, folder),
        PruningOptions(f"{mine}:Mine", 0.5),
    ]
    before = [each.digest for each in options]
    assert len(set(before)) == len(before)
    policy_folder(tmp_path / "policy", model, [0], keep_bias=0.5)
    mine.write_text(mine.read_text() + "    positions = 'renumbered'\n")
    again = [PruningOptions(each.method, each.keep, each.policy).digest for each in options]
    assert again[:3] == before[:3] and again[3] != before[3] and again[4] != before[4]


# --- methods ---


def test_methods_that_need_the_tower_alone():
    names = possible()
    assert {"divprune", "visionzip", "fastervlm", "random", "toprl", "oneshot"} <= set(names)
    assert not {"fastv", "pyramiddrop", "sparsevlm", "downsample"} & set(names)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("fastv", "reads attention inside the decoder; methods that can: toprl,"),
        ("downsample", "hooks modules of transformers"),
        ("divprune+fastv", "prunes inside the decoder"),
    ],
)
def test_methods_that_need_more(method, message):
    with pytest.raises(ValueError, match=message):
        PruningOptions(method, 0.5).prepare(tiny.load()[0].config)


@pytest.mark.parametrize(
    ("method", "stages", "message"),
    [
        ("visionzip", ((2, 0.5),), "VisionZip hooks modules of transformers, .*: give keep in place of stages"),
        ("visionzip+fastv", ((0, 0.5), (2, 0.25)), "VisionZip hooks modules of transformers"),
        ("fastv", ((0, 0.5),), "reads the attention of the layer before"),
        ("fastv", ((6, 0.5),), r"stage at layer 6, but the decoder has layers 0\.\.5"),
        ("divprune+fastv", ((2, 0.5),), "2 stages are needed"),
    ],
)
def test_stages_that_cannot_be(method, stages, message):
    with pytest.raises(ValueError, match=message):
        PruningOptions(method, stages=stages).prepare(tiny.load()[0].config)


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm", "random", "divprune+fastv"])
def test_methods_inside_the_decoder(method):
    options = PruningOptions(method, stages=((0 if "+" in method else 1, 0.5), (3, 0.25)))
    policy = options.prepare(tiny.load()[0].config)
    assert not why_not_inside(policy) and len(policy.counts(options.schedule, 64)) == 2


def test_trained_stages(tmp_path):
    model = tiny.load()[0]
    folder = policy_folder(tmp_path, model, [1, 3])
    PruningOptions("toprl", None, folder, ((1, 0.5), (3, 0.25))).prepare(model.config)
    with pytest.raises(ValueError, match=r"stages at layers \(2, 3\), but the policy was trained for \(1, 3\)"):
        PruningOptions("toprl", None, folder, ((2, 0.5), (3, 0.25))).prepare(model.config)


def test_a_method_that_reads_the_question():
    class Asks(Policy):
        pass

    assert "reads the question" in why_not(Asks())


def test_models_that_do_not_fit(tmp_path):
    config = build_model("qwen2_5_vl").config
    with pytest.raises(ValueError, match=r"method='visionzip' .*a CLIP tower only, not in qwen2_5_vl"):
        PruningOptions("visionzip", 0.5).prepare(config)
    siglip = build_model("llava").config
    siglip.vision_config.model_type = "siglip_vision_model"
    with pytest.raises(ValueError, match="not in llava with siglip_vision_model: choose another method"):
        PruningOptions("fastervlm", 0.5).prepare(siglip)
    folder = policy_folder(tmp_path, tiny.load()[0], [0])
    with pytest.raises(ValueError, match="policy: trained for"):
        PruningOptions("toprl", 0.5, folder).prepare(config)


def test_policies_for_other_stages(tmp_path):
    model = tiny.load()[0]
    folder = policy_folder(tmp_path, model, [1, 2, 3])
    with pytest.raises(ValueError, match=r"trained for stages before layers \(1, 2, 3\).*\"method\": \"oneshot\""):
        PruningOptions("toprl", 0.5, folder).prepare(model.config)
    PruningOptions("oneshot", 0.5, folder).prepare(model.config)
    asks = policy_folder(tmp_path / "asks", model, [0], condition_on="text")
    with pytest.raises(ValueError, match=r"reads the question|reads attention"):
        PruningOptions("toprl", 0.5, asks).prepare(model.config)


# --- placeholders ---


def test_prompts_are_shortened():
    flags = [False, True, True, True, False]
    assert shorten(flags, 2) == [0, 1, 2, 4]
    assert shorten(flags, 3) == [0, 1, 2, 3, 4] and shorten([True] * 4, 1) == [0]
    with pytest.raises(ValueError, match="pan and scan"):
        shorten([True, False, True], 1)


def test_places_in_the_full_prompt():
    assert full_places(6, [Gap(1, 2, 5)]) == [0, 1, 1, 6, 7, 8]
    # two images side by side, and text after them
    assert full_places(6, [Gap(3, 1, 4), Gap(0, 3, 6)]) == [0, 0, 0, 6, 10, 11]
    assert full_places(3, []) == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_offsets_survive_as_columns(dtype):
    offsets = torch.tensor([[0, 0, 0], [1, 255, 256], [257, 65535, 40000]])
    assert torch.equal(from_columns(to_columns(offsets, torch.zeros(1, dtype=dtype))), offsets)
    with pytest.raises(ValueError, match="an image of 65537 tokens"):
        to_columns(offsets + 1, torch.zeros(1, dtype=dtype))


# --- the selection ---


@pytest.mark.parametrize("policy", [DivPrune, RandomPolicy])
def test_selection_is_that_of_attach(policy):
    """Three images encoded together, against three prompts one by one; what is beyond the width follows along."""
    model = build_model("llava")
    options = PruningOptions(policy.__name__, 0.4)
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(count, 70, generator=generator) for count in (16, 9, 16)]
    chosen = ImagePruning(policy(), options, 64)(features, {})
    for each, (kept, index) in zip(features, chosen, strict=True):
        embeddings = torch.cat([each[:, :64], torch.randn(3, 64, generator=generator)])[None]
        mask = torch.arange(len(embeddings[0])) < len(each)
        with attach(model, policy(), schedule=options.schedule) as pruner:
            model(inputs_embeds=embeddings, visual_mask=mask[None])
        assert pruner.trace[0].indices[0].tolist() == index.tolist()
        assert torch.equal(kept, each[index])


def test_policies_that_choose_the_number():
    class Adaptive(Policy):
        uses_text = False

        def decide(self, context):
            from toprl_models import Decision

            return Decision(context.hidden_states[..., 0], keep_mask=context.valid_mask)

    with pytest.raises(ValueError, match="chooses how many tokens it keeps"):
        ImagePruning(Adaptive(), PruningOptions("x", 0.5), 8)([torch.randn(4, 8)], {})


def test_text_is_out_of_reach():
    class Peeks(Policy):
        uses_text = False

        def score(self, context):
            return context.last_attention()

    with pytest.raises(RuntimeError, match="images are encoded apart from their prompt"):
        ImagePruning(Peeks(), PruningOptions("x", 0.5), 8)([torch.randn(4, 8)], {})


# --- the package ---


def test_entry_point_and_imports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["toprl"].partition(":")
    assert callable(getattr(import_module(module), function))
    assert any("vllm" in each for each in project["optional-dependencies"]["vllm"])
    assert "vllm" not in sys.modules


def test_docs_name_every_class():
    text = (ROOT / "docs/serve.md").read_text()
    assert all(name in text for name in ARCHITECTURES)


def test_class_token_methods_are_hooked_elsewhere():
    assert not why_not(FasterVLM())
