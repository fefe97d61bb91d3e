"""Loading a model as the flags say: device maps, attention implementations, what is no model."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import transformers

from toprl_models import tiny
from training.tasks import device_of, load_model, make_task
from training.trainer.config import PPOConfig
from training.trainer.data import training_data

BATCH = 8


@pytest.fixture(scope="module")
def task():
    return make_task("colour", "train", 20)


@pytest.mark.parametrize("device_map", ["cpu", '{"": "cpu"}'])
def test_a_device_map(device_map, task):
    model, processor = load_model("tiny", "", torch.bfloat16, "eager", device_map)
    assert device_of(model) == torch.device("cpu") and model.dtype == torch.bfloat16
    assert model.config.get_text_config()._attn_implementation == "eager"
    expected, _ = tiny.load(dtype=torch.bfloat16)
    theirs = expected.state_dict()
    assert all(torch.equal(one, theirs[name]) for name, one in model.state_dict().items())
    data = training_data(model, processor, task, BATCH)
    assert data.quality.mean() > 0.5


def test_weights_on_disk_run_where_the_map_says(task, tmp_path):
    """With offloaded weights ``model.device`` is "meta"; inputs go where the layers run."""
    from accelerate import disk_offload

    model, processor = tiny.load()
    data = training_data(model, processor, task, BATCH)
    disk_offload(model, tmp_path / "offload", execution_device=torch.device("cpu"))
    assert model.device.type == "meta" and device_of(model) == torch.device("cpu")
    assert torch.equal(training_data(model, processor, task, BATCH, tmp_path / "cache").quality, data.quality)


def test_the_map_names_the_device():
    model, _ = tiny.load()
    model.hf_device_map = {"model.vision_tower": "cpu", "model.language_model": 1, "lm_head": "disk"}
    assert device_of(model) == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("no/such-model", {}, "--model_name_or_path no/such-model: cannot be loaded"),
        ("no/such-model", {"attn_implementation": "eager"}, "--attn_implementation eager: cannot be loaded"),
        ("tiny", {"device_map": "{oops"}, "--device_map {oops: must be auto, a device, or a JSON object"),
        ("tiny", {"device_map": "nowhere"}, "--model_name_or_path tiny --device_map nowhere: cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded(name, changes, message):
    with pytest.raises(ValueError, match=message):
        load_model(name, "cpu", **changes)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=rf"--model_name_or_path {tmp_path}: cannot be loaded .*local folder"):
        load_model(str(tmp_path), "cpu")


def test_a_processor_without_its_packages(monkeypatch):
    def fail(*args, **kwargs):
        raise ImportError("AutoVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", fail)
    with pytest.raises(ImportError, match=r"the processor of a/model needs torchvision: pip install 'toprl-kernels"):
        load_model("a/model", "cpu")


def test_a_device_map_needs_accelerate(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="--device_map auto needs accelerate: pip install accelerate"):
        load_model("tiny", "cpu", device_map="auto")


def test_quantised_weights(monkeypatch):
    asked = {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def from_pretrained(folder, **options):
        asked.update(options)
        return tiny.load()[0]

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    load_model("tiny", "cpu", torch.bfloat16, quantization="4bit")
    config = asked["quantization_config"]
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and asked["device_map"] == {"": "cpu"}
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    load_model("tiny", "cpu", quantization="8bit", device_map="auto")
    assert asked["quantization_config"].load_in_8bit and asked["device_map"] == "auto"


def test_quantised_weights_need_bitsandbytes(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="--quantization 4bit needs bitsandbytes: pip install bitsandbytes"):
        load_model("tiny", "cpu", quantization="4bit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "3bit"}, "--quantization 3bit must be one of 4bit, 8bit"),
        ({"device": "cpu", "device_map": "auto"}, "--device cpu --device_map auto: give one of them"),
        ({"rollout_batch_size": -1}, "--rollout_batch_size -1 must be 0 or more"),
        ({"feature_cache_mb": -0.5}, "--feature_cache_mb -0.5 must be 0 or more"),
    ],
)
def test_flags_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**changes)
