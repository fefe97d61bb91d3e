"""python -m toprl_models.check: what it says is what the tests found, and README and docs repeat it word for word."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.models.features import ALL_FAMILIES, FEATURES
from tests.models.tiny_families import FAMILY_NAMES, build_model
from tests.models.zoo import ZOO
from toprl_models import check
from toprl_models.families import FAMILIES
from toprl_models.tiny import CHECKPOINT

ROOT = Path(__file__).resolve().parents[2]


def test_the_stored_matrix_is_whole() -> None:
    matrix = check.feature_matrix()
    assert list(matrix) == list(FEATURES)
    whole = list(matrix["images"])
    assert set(FAMILY_NAMES) <= set(whole) and whole == [family for family in ALL_FAMILIES if family in whole]
    for feature, row in matrix.items():
        assert list(row) == whole, feature
        for family, outcome in row.items():
            assert outcome == "pass" or outcome.startswith(("n/a: ", "not run: ")), (feature, family, outcome)


def test_every_family_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    check.main([])
    printed = capsys.readouterr().out
    for family in FAMILIES.values():
        assert f"{family.title} ({family.model_class})" in printed
        assert family.visual_rule in printed
        assert check.model_type_of(family) in ALL_FAMILIES
    assert "tested: images" in printed


@pytest.mark.since("5.23")
def test_pages_repeat_the_generated_tables() -> None:
    assert (ROOT / "docs/families.md").read_text() == check.page() + "\n", "run make feature-matrix"


def test_one_model_by_its_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    check.main([str(CHECKPOINT)])
    printed = capsys.readouterr().out
    assert "before layers 0 to 5" in printed and "6 attention; plain positions" in printed
    assert "mode mask: yes" in printed and printed.endswith("verdict: exact\n")


@pytest.mark.since("5.23")
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("Qwen3VLForConditionalGeneration", ("before layers 0 to 5", "M-RoPE positions", "outcome: exact")),
        (
            "Qwen3_5ForConditionalGeneration",
            (
                "4 linear_attention (keeps a state), 2 full_attention",
                "mode compact: yes",
                "mode mask: no: Qwen3_5",
            ),
        ),
        ("Gemma4ForConditionalGeneration+shared_kv", ("stages may lie before layers 0 to 2", "mode mask: yes")),
        ("NemotronH_Omni_Reasoning_V3", ("(no attention)", "mode compact: yes")),
    ],
)
def test_structure_by_the_config(
    name: str, lines: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    build_model(ZOO[name]).config.save_pretrained(tmp_path)
    check.main([str(tmp_path), "--structure_only"])
    printed = capsys.readouterr().out
    for line in lines:
        assert line.replace("outcome: ", "") in printed
    assert "verdict" not in printed


@pytest.mark.since("5.23")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MllamaForConditionalGeneration", "reads its images by cross-attention"),
        ("T5Gemma2ForConditionalGeneration", "is an encoder-decoder"),
        ("InstructBlipForConditionalGeneration", "has a generate\\(\\) of its own"),
        ("GitForCausalLM", "has no text decoder with a list of 6 `layers`"),
    ],
)
def test_why_a_model_cannot_be_pruned(name: str, reason: str, tmp_path: Path) -> None:
    build_model(ZOO[name]).config.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=f"{name}, which is not supported: it {reason}"):
        check.describe_model(str(tmp_path))


def test_an_unsupported_model_is_an_error(tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"model_type='bert' is no image-text-to-text model"):
        check.describe_model(str(tmp_path))


def test_a_method_by_its_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    check.main(["--method", "visionzip+fastv"])
    printed = capsys.readouterr().out
    assert "stages before layers 0, 2 of 32" in printed
    assert "LLaVA-1.5: applies" in printed and "InternVL3: applies" in printed
    (tmp_path / "mine.py").write_text("from toprl_models import DivPrune\n")
    arguments = [str(CHECKPOINT), "--structure_only", "--method"]
    check.main([*arguments, f"{tmp_path}/mine.py:DivPrune"])
    assert "mine.py:DivPrune: stages before layers 0" in capsys.readouterr().out
    check.main([*arguments, "random"])
    assert "method random: stages before layers 1, 2, 3" in capsys.readouterr().out
    (tmp_path / "late.py").write_text("from toprl_models import DivPrune\nclass Late(DivPrune): pass\n")
    check.main([*arguments, f"{tmp_path}/late.py:Late"])  # not registered: it may prune anywhere, but does not want to
    assert "Late chooses tokens before the language model: use one stage" in capsys.readouterr().out
    with pytest.raises(ValueError, match="'fastvv' is unknown"):
        check.main(["--method", "fastvv"])
