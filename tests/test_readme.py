"""README and the first pages of docs: Python blocks run as printed, tables and links are true, README is short."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

from tests.models.tiny_families import build_inputs, build_model
from toprl_models import families

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ("README.md", "docs/start.md", "docs/prune.md", "docs/add_method.md", "docs/add_family.md")
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL))
]


class Processor:
    """Stand-in for the processor of a model that would be downloaded: tiny inputs for a chat with an image."""

    tokenizer = None

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        (image, text) = messages[0]["content"]
        assert image == {"type": "image"} and add_generation_prompt
        return text["text"]

    def __call__(self, text: list[str], images: list[Image.Image], return_tensors: str) -> transformers.BatchFeature:
        assert text[0] and len(images) == 1 and return_tensors == "pt"
        return transformers.BatchFeature(build_inputs("qwen2_5_vl", [("image",)]))

    def batch_decode(self, tokens: Any) -> list[str]:
        return [" ".join(map(str, row.tolist())) for row in tokens]


@pytest.mark.parametrize("block", BLOCKS)
def test_block(block: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: Processor())
    load = lambda name, dtype: build_model("qwen2_5_vl")  # noqa: E731
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", load)
    exec(compile(block, "block", "exec"), {"__name__": "block"})
    assert "print(" not in block or capsys.readouterr().out.strip()


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == 6 and len(BLOCKS[0].values[0].strip().splitlines()) <= 9


def test_readme_is_short() -> None:
    assert len(README.split()) <= 1200


def test_tables_are_those_of_the_code() -> None:
    assert runpy.run_path(str(ROOT / "docs/figures.py"))["with_tables"](README) == README, "run docs/figures.py"


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_page_is_in_the_site() -> None:
    listed = set(re.findall(r"- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    assert listed == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}


@pytest.mark.parametrize("figure", ["accuracy_figure", "time_figure"])
def test_figures_are_drawn_from_the_stored_results(figure: str) -> None:
    axes = runpy.run_path(str(ROOT / "docs/figures.py"))[figure]().axes[0]
    assert len(axes.containers) >= 4
