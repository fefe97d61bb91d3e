"""Commands end with one line that says what to do; the traceback is there for those who ask."""

from __future__ import annotations

import sys

import pytest

from training import cli
from training.ppo import PPOConfig


def fail(arguments: list[str]) -> None:
    raise ValueError(f"--gamma {arguments[1]}:\nmust lie in [0, 1]")


def test_an_error_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--gamma", "2"])
    with pytest.raises(SystemExit) as ended:
        cli.run(fail)
    assert ended.value.code == "error: --gamma 2: must lie in [0, 1] (--debug shows the traceback)"


def test_debug_keeps_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--debug", "--gamma", "2"])
    with pytest.raises(ValueError, match="--gamma 2"):
        cli.run(fail)


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppo.py"])
    with pytest.raises(IndexError):
        cli.run(fail)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_flags_from_a_file(tmp_path, suffix):
    file = tmp_path / f"flags.{suffix}"
    file.write_text('{"gamma": 0.5, "stage_layers": [1, 2]}')
    assert cli.parse(PPOConfig, "", [str(file)]) == cli.parse(PPOConfig, "", "--gamma 0.5 --stage_layers 1 2".split())
    assert cli.parse(PPOConfig, "", [str(file), "--gamma", "0.7"]).gamma == 0.7
    for content in ('{"gama": 0.5}', "gamma", ""):
        file.write_text(content)
        with pytest.raises(ValueError, match=f"flags.{suffix}: (gama|no list of flags)"):
            cli.parse(PPOConfig, "", [str(file)])
