"""The command line: what it prints, and the exit code."""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import megascore
from megascore.cli import main
from megascore.errors import DataError, RankFailure
from megascore.process.failures import first_error, is_lost_contact, run_and_report
from megascore.scores.score_file import Scores

pytestmark = pytest.mark.fast

FFN = "decoder.layers.0.mlp.linear_fc2/ffn/l2_norm"


@pytest.fixture(autouse=True)
def _no_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE", "MEGASCORE_DEBUG", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Paths of score files: a; near, off by 1e-3; other, with another site."""
    a = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    contents = {"a": {FFN: a}, "near": {FFN: a * torch.tensor([1, 1, 1, 1.001])}, "other": {FFN: a, "x/ffn/y": a}}
    for name, values in contents.items():
        Scores(values, {"model": {"name": name}}).save(tmp_path / name)
    return {name: str(tmp_path / name) for name in contents}


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text("model:\n  hf: nowhere\ndata:\n  text: nowhere.txt\n")
    return str(path)


def put_job(monkeypatch: pytest.MonkeyPatch, run_job: Callable[..., Any]) -> None:
    """Stand in for the job, which needs megatron and minutes."""
    module = ModuleType("megascore.job.job")
    module.run_job = run_job  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megascore.job.job", module)


def test_the_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"megascore {megascore.__version__}\n"


def test_help_documents_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for code in (0, 1, 2, 3):
        assert f"\n  {code}  " in text


@pytest.mark.parametrize(
    "arguments",
    [[], ["nix"], ["show"], ["show", "f", "--fraction", "25"], ["compare", "a", "b", "--tolerance", "-1"]],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: megascore" in capsys.readouterr().err


def test_show_prints_the_tables(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", files["a"], "--fraction", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert "first at 50 %" in out
    assert "2: 0 1" in out
    assert err == ""


def test_a_bad_file_is_one_line_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "[red]x").write_bytes(b"garbage")
    assert main(["show", str(tmp_path / "[red]x")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"megascore: error: score file {tmp_path}/[red]x can't be read")
    assert len(err.splitlines()) == 1


def test_debugging_adds_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MEGASCORE_DEBUG", "1")
    assert main(["show", "nowhere"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "megascore: error:" in err


@pytest.mark.parametrize(
    ("a", "b", "options", "code"),
    [
        ("a", "near", [], 0),
        ("a", "near", ["--tolerance", "1e-2"], 0),
        ("a", "near", ["--tolerance", "1e-4"], 1),
        ("a", "other", [], 0),
        ("a", "other", ["--tolerance", "1"], 1),
        ("a", "a", ["--tolerance", "0", "--all"], 0),
        ("a", "missing", ["--tolerance", "1"], 2),
    ],
)
def test_compare_exits_by_its_tolerance(
    files: dict[str, str], a: str, b: str, options: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", files[a], files.get(b, "missing"), *options]) == code
    if code != 2:
        assert "sites compared, largest relative difference" in capsys.readouterr().out


def test_score_hands_the_checked_config_to_the_job(monkeypatch: pytest.MonkeyPatch, config_file: str) -> None:
    configs = []
    put_job(monkeypatch, lambda config, console: configs.append(config))
    assert main(["score", config_file, "run.steps=0", "parallel.tensor=2"]) == 0
    assert configs[0].run.steps == 0
    assert configs[0].parallel.tensor == 2
    assert configs[0].model.hf == "nowhere"


def test_a_wrong_key_stops_before_the_job(
    monkeypatch: pytest.MonkeyPatch, config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put_job(monkeypatch, lambda config, console: pytest.fail("the job was started"))
    assert main(["score", config_file, "run.stepz=0"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("megascore: error: ")
    assert "stepz" in err


def test_without_megatron_the_package_to_install_is_named(
    monkeypatch: pytest.MonkeyPatch, config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    real_import = builtins.__import__

    def import_without_megatron(name: str, *rest: Any, **options: Any) -> Any:
        if name == "megascore.job.job":
            raise ModuleNotFoundError("No module named 'megatron'", name="megatron.core")
        return real_import(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", import_without_megatron)
    assert main(["score", config_file]) == 2
    assert "pip install 'megascore[megatron]'" in capsys.readouterr().err


def test_an_error_of_one_rank_names_the_rank(
    monkeypatch: pytest.MonkeyPatch, config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise DataError("the text is too short")

    put_job(monkeypatch, fail)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["score", config_file]) == 2
    assert capsys.readouterr().err == "megascore: error: rank 2: the text is too short\n"


def test_an_unknown_error_comes_through(monkeypatch: pytest.MonkeyPatch, config_file: str) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    put_job(monkeypatch, fail)
    with pytest.raises(ZeroDivisionError):
        main(["score", config_file])


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("[gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), "lost contact with another rank"),
        (RankFailure("loading failed on rank 0: no such file\n--- its traceback ---"), "loading failed on rank 0"),
    ],
)
def test_a_rank_that_stops_because_of_another_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, config_file: str, capsys: pytest.CaptureFixture[str], error: Exception, text: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    put_job(monkeypatch, fail)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["score", config_file]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megascore: rank 2 stopped: {text}")


@pytest.mark.parametrize(("is_own", "code"), [(True, 2), (False, 3)])
def test_what_another_rank_tells_is_not_said_again(
    is_own: bool, code: int, monkeypatch: pytest.MonkeyPatch, config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        failure = RankFailure("checking the layout failed on rank 0: 3 does not divide 2")
        failure.is_told, failure.is_own = True, is_own
        raise failure

    put_job(monkeypatch, fail)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["score", config_file]) == code
    assert capsys.readouterr().err == ""


def fail_and_fail_while_cleaning_up() -> None:
    try:
        raise DataError("first")
    finally:
        raise RuntimeError("Connection reset by peer")


def test_an_error_while_cleaning_up_does_not_hide_the_first() -> None:
    with pytest.raises(RuntimeError) as caught:
        fail_and_fail_while_cleaning_up()
    assert is_lost_contact(caught.value)
    assert str(first_error(caught.value)) == "first"


def test_only_runtime_errors_are_lost_contact() -> None:
    assert not is_lost_contact(BrokenPipeError("Broken pipe"))
    assert not is_lost_contact(RuntimeError("shape mismatch"))


def test_the_summary_is_written_where_torchrun_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    def fail() -> int:
        raise DataError("too short")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no" / "such" / "folder"))
    monkeypatch.setattr("torch.distributed.elastic.multiprocessing.errors.record", lambda function: function)
    with open(os.devnull, "w") as stream:
        # A place that can't be written to must not hide the error itself.
        assert run_and_report(fail, Console(file=stream)) == 2
