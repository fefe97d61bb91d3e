"""TopRLPolicy: what it computes, saving, strict loading."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from tests.models.conftest import BATCHES
from tests.models.tiny_families import build_inputs, build_model
from toprl_models import METHODS, DivPrune, FastV, OneShot, Policy, Schedule, TopRLPolicy, attach
from toprl_models.methods.toprl import model_signature


def make_policy(**changes):
    torch.manual_seed(0)
    return TopRLPolicy(**({"hidden_size": 64, "stage_layers": [1, 3], "actor_size": 8} | changes))


def test_saved_and_loaded_is_the_same(tmp_path):
    policy = make_policy(base_model=model_signature(build_model()), metadata={"task": "ocr"})
    policy.save_pretrained(tmp_path)
    loaded = TopRLPolicy.from_pretrained(tmp_path)
    assert loaded.stage_layers == (1, 3)
    assert loaded.metadata == {"task": "ocr"}
    for name, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with attach(build_model(), loaded, schedule=Schedule(((1, 0.5), (3, 0.25)))) as pruner:
        pruner.model(**build_inputs("llava", BATCHES["padded"]))
    assert [s.counts for s in pruner.trace] == [(8, 16, 0), (4, 8, 0)]


def test_a_fresh_actor_keeps_most_tokens():
    policy = make_policy()
    logits = policy.logits(torch.randn(2, 5, 64), 0, torch.ones(2, 5, dtype=torch.bool))
    keep = (logits[..., 0] - logits[..., 1]).sigmoid()
    assert ((keep > 0.7) & (keep < 0.9)).all()


def test_padding_changes_neither_logits_nor_value():
    policy = make_policy()
    states, text, fraction = torch.randn(1, 6, 64), torch.randn(1, 64), torch.ones(1)
    valid = torch.tensor([[True] * 4 + [False] * 2])
    cut = valid[:, :4]
    torch.testing.assert_close(policy.logits(states, 1, valid)[:, :4], policy.logits(states[:, :4], 1, cut))
    torch.testing.assert_close(
        policy.value(states, 1, valid, text, fraction), policy.value(states[:, :4], 1, cut, text, fraction)
    )


def test_no_token_left():
    policy = make_policy()
    empty = torch.zeros(2, 0, 64)
    assert policy.logits(empty, 0, torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0, 2)
    value = policy.value(empty, 0, torch.zeros(2, 0, dtype=torch.bool), torch.randn(2, 64), torch.zeros(2))
    assert value.isfinite().all()


def test_corrupt_folders_are_refused(tmp_path):
    make_policy().save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="corrupt"):
        TopRLPolicy.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        TopRLPolicy.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json"):
        TopRLPolicy.from_pretrained(tmp_path / "..")


def test_weights_of_another_size_are_refused(tmp_path):
    make_policy().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"actor_size": 16}))
    with pytest.raises(ValueError, match="does not match"):
        TopRLPolicy.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        TopRLPolicy.from_pretrained(tmp_path)


def test_missing_weights_are_refused(tmp_path):
    """The hub mixin loads leniently by default; a policy must not keep random weights."""
    from safetensors.torch import load_file, save_file

    make_policy().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("head.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"head\.bias"):
        TopRLPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes", [{"hidden_size": 0}, {"actor_size": 7}, {"stage_layers": []}])
def test_bad_sizes(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        make_policy(**changes)


def test_which_decisions_depend_on_the_text() -> None:
    """Those that do not may prune a prompt that ends in an image."""
    blind = {name for name, method in METHODS.items() if not method.trained and not method.make().uses_text}
    assert blind == {
        *("visionzip", "fastervlm", "divprune", "downsample", "random", "vispruner", "holov", "prumerge_plus"),
        *("hiprune", "gprune", "tome", "evs", "vidcom2", "dycoke", "fastvid"),
    }
    for condition_on, uses_text in (("none", False), ("text", True)):
        policy = TopRLPolicy(8, [1, 2], 8, condition_on=condition_on)
        assert policy.uses_text is uses_text and OneShot(policy, 2).uses_text is uses_text
    assert OneShot(FastV(), 2).uses_text and not OneShot(DivPrune(), 0).uses_text
    assert Policy().uses_text


@pytest.mark.parametrize("name", ["TopRLPolicy", "model_signature"])
def test_names_that_moved_say_where_they_are(name):
    with pytest.raises(ImportError, match=f"no {name}: import it from toprl_models.methods.toprl"):
        getattr(importlib.import_module("toprl_models.policy"), name)
    assert not hasattr(importlib.import_module("toprl_models.policy"), "Nothing")
