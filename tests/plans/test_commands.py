"""``megascore plan`` and ``prune``: what they print and write, and the exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

import megascore
from megascore.cli import main
from tests.models import save_checkpoint
from tests.smaller import scored

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def _no_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE", "MEGASCORE_DEBUG", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_checkpoint(tmp_path / "model", "qwen3")
    scored(folder, "ffn", "layers").save(tmp_path / "scores")
    return folder


def test_from_scores_to_a_smaller_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, smaller = str(tmp_path / "plan.yaml"), str(tmp_path / "smaller")
    command = ["plan", str(tmp_path / "scores"), "ffn=50%", "layers=3", "multiple_of=8", "--to", plan]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert [line.split()[:4] for line in shown.splitlines() if line.strip().startswith("ffn")] == [
        ["ffn", "96", "48", "50.0"]
    ]
    assert f"Plan written to {plan}" in shown
    assert main(command) == 2
    assert "exists already: choose another path, or allow replacing it (--overwrite)" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert main(["prune", plan, str(model), smaller]) == 0
    assert f"Model written to {smaller}" in capsys.readouterr().out
    assert megascore.load_plan(plan).after.parameters < megascore.load_plan(plan).before.parameters
    assert main(["prune", plan, str(model), smaller]) == 2
    assert f"{smaller} exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        (["fnn=50%"], "a plan has no key 'fnn': expected ffn"),
        (["ffn"], "'ffn' is not key=value"),
        (["ffn=8", "ffn=16"], "ffn is given twice: 8 and 16"),
        (["experts=2"], "experts: the model has none"),
        (["hidden_size=56", "multiple_of=8"], "the score file has no scores of hidden_size"),
    ],
)
def test_a_wrong_request_is_one_line_and_code_2(
    pairs: list[str], text: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tmp_path / "scores"), *pairs, "--to", str(tmp_path / "plan.yaml")]) == 2
    assert text in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "plan.yaml").exists()


def test_help_of_each_command_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("plan", "prune", "evaluate", "search"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        assert "%%" not in capsys.readouterr().out
