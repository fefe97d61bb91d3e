"""The built wheel, installed apart from the tree: what is in it, and that it works with as little as possible."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
OPS = """
import torch, toprl_kernels
assert "transformers" not in sys.modules
query = torch.randn(1, 2, 9, 16)
keep = torch.rand(1, 9) > 0.3
assert toprl_kernels.masked_attention(query, query, query, keep).shape == query.shape
kept, _ = toprl_kernels.topk_compact(torch.randn(1, 9, 4), torch.rand(1, 9), 3)[:2]
assert kept.shape == (1, 3, 4)
"""
MODEL = """
from PIL import Image
from toprl_models import FastV, Schedule, attach, tiny
model, processor = tiny.load()
text = tiny.prompt("which digit is in the picture ?")
inputs = processor(images=Image.new("RGB", (128, 128)), text=text, return_tensors="pt")
with attach(model, FastV(), schedule=Schedule(((2, 8),))) as pruner:
    model.generate(**inputs, max_new_tokens=2)
assert pruner.trace[0].counts == (8,)
"""


@pytest.fixture(scope="module")
def distribution(tmp_path_factory):
    """The folder with the wheel, the source distribution, and what the wheel installs."""
    folder = tmp_path_factory.mktemp("distribution")
    build = f"import hatchling.build as b; b.build_wheel({str(folder)!r}); b.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "installed")
    return folder


def test_the_wheel_holds_the_packages_alone(distribution):
    installed = distribution / "installed"
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"toprl_kernels", "toprl_models"}
    assert all((installed / name / "py.typed").is_file() for name in ("toprl_kernels", "toprl_models"))
    assert not [path for path in installed.rglob("*") if "test" in path.name and path.name != "testing.py"]
    for path in ROOT.glob("src/*/**/*"):
        if path.is_file() and path.suffix != ".pyc":
            assert (installed / path.relative_to(ROOT / "src")).is_file()


def test_the_source_distribution_can_run_the_tests(distribution):
    with tarfile.open(next(distribution.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "constraints.txt", "training/ppo.py", "bench/run.py", "tests/test_distribution.py"} <= names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocked", "code"),
    [
        (("triton", "transformers", "PIL", "safetensors"), OPS),
        (("triton", "matplotlib", "sacrebleu", "easy_vqa"), MODEL),
    ],
    ids=["ops without triton and transformers", "a model without the extras of training"],
)
def test_the_wheel_works_outside_of_the_tree(distribution, tmp_path, blocked, code):
    environment = os.environ | {"PYTHONPATH": str(distribution / "installed"), "PYTHONWARNINGS": "ignore"}
    where = f"import toprl_kernels; assert {str(distribution)!r} in toprl_kernels.__file__\n"
    script = BLOCK.format(names=set(blocked)) + where + code
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
