"""load_processor(): errors of transformers about missing packages say what to install."""

from __future__ import annotations

import pytest
import transformers

from toprl_models import tiny
from toprl_models.processors import PACKAGES, load_processor

# as transformers 5.23 words them
TORCHVISION = (
    "\nAutoVideoProcessor requires the Torchvision library but it was not found in your environment. Check out the "
    "instructions on the\ninstallation page"
)
VIDEO = "a/model requires `torchvision` to be installed. Please install `torchvision` and try again."
WORDS = "Package `num2words` is required to run SmolVLM processor. Install it with `pip install num2words`."


@pytest.mark.parametrize(
    ("error", "package"),
    [
        (ImportError(TORCHVISION), "torchvision"),
        (ValueError(VIDEO), "torchvision"),
        (ImportError(WORDS), "num2words"),
        (ImportError("No module named 'else'"), "a package that is not installed"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(error, package, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", fail)
    expected = rf"the processor of a/model needs {package}: pip install 'toprl-kernels\[vision\]'"
    with pytest.raises(ImportError, match=expected) as raised:
        load_processor("a/model")
    assert str(error).strip() in str(raised.value) and raised.value.__cause__ is error


@pytest.mark.parametrize("error", [ValueError("Unrecognized processing class"), OSError("no such folder")])
def test_other_errors_are_those_of_transformers(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", fail)
    with pytest.raises(type(error), match=str(error)):
        load_processor("a/model")


def test_a_processor_is_loaded():
    processor = load_processor(str(tiny.CHECKPOINT), padding_side="left")
    assert processor.tokenizer.padding_side == "left"


def test_the_extra_has_these_packages():
    import tomllib
    from pathlib import Path

    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extra = " ".join(extras["optional-dependencies"]["vision"])
    assert all(package in extra for package in PACKAGES)
