"""python -m toprl_models.check: what it says is what the tests found, and README and docs repeat it word for word."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.models.features import ALL_FAMILIES, FEATURES
from tests.models.tiny_families import FAMILY_NAMES, build_model
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


def test_pages_repeat_the_generated_tables() -> None:
    assert (ROOT / "docs/families.md").read_text() == check.page() + "\n", "run make feature-matrix"
    assert check.families_markdown() in (ROOT / "README.md").read_text(), "paste the table of docs/families.md"


def test_one_model_by_its_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    check.main(["--model_name_or_path", str(CHECKPOINT)])
    assert "before layers 0 to 5" in capsys.readouterr().out
    build_model("qwen3_vl").config.save_pretrained(tmp_path)
    check.main(["--model_name_or_path", str(tmp_path)])
    assert "before layers 0 to 5" in capsys.readouterr().out


def test_an_unsupported_model_is_an_error(tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"model_type='bert'.*supported: .*llava"):
        check.describe_model(str(tmp_path))


def test_a_method_by_its_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    check.main(["--method", "visionzip+fastv"])
    printed = capsys.readouterr().out
    assert "stages before layers 0, 2 of 32" in printed
    assert "LLaVA-1.5: applies" in printed and "InternVL3: InternVL merges 4 patches" in printed
    (tmp_path / "mine.py").write_text("from toprl_models import DivPrune\n")
    arguments = ["--model_name_or_path", str(CHECKPOINT), "--method"]
    check.main([*arguments, f"{tmp_path}/mine.py:DivPrune"])
    assert "mine.py:DivPrune: stages before layers 0" in capsys.readouterr().out
    check.main([*arguments, "random"])
    assert "method random: stages before layers 1, 2, 3" in capsys.readouterr().out
    (tmp_path / "late.py").write_text("from toprl_models import DivPrune\nclass Late(DivPrune): pass\n")
    check.main([*arguments, f"{tmp_path}/late.py:Late"])  # not registered: it may prune anywhere, but does not want to
    assert "Late chooses tokens before the language model: use one stage" in capsys.readouterr().out
    with pytest.raises(ValueError, match="'fastvv' is unknown"):
        check.main(["--method", "fastvv"])
