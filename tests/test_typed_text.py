"""Text keys of a job keep what was typed, in files and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from megascore.config import JobConfig, load_config
from megascore.errors import ConfigError
from megascore.typed_text import text_keys

pytestmark = pytest.mark.fast

TYPED = ("4711_3", "0010", "12e5678", "1.10", "on", "no", "0x1f", "2026-11-26", "1:30", "1_000", ".5", "+1", "a: b")
JOB = "model: {hf: m}\ndata: {text: t, sequence_length: 8}\nscores: minitron\n"


def load(folder: Path, content: str, *overrides: str) -> JobConfig:
    path = folder / "job.yaml"
    path.write_text(content)
    return load_config(path, overrides)


@pytest.mark.parametrize("typed", [*TYPED, "#1", "a #b", "[1", "{", "a=b", "*x", "&y", "!z", "it's", "a, b", "名"])
def test_the_command_line_keeps_text_as_typed(typed: str, tmp_path: Path) -> None:
    config = load(tmp_path, JOB, f"run.checkpoint_dir={typed}", f"run.output={typed}", f"data.field={typed}")
    assert (config.run.checkpoint_dir, config.run.output, config.data.field) == (typed, typed, typed)


@pytest.mark.parametrize("typed", [typed for typed in TYPED if ": " not in typed])
def test_files_keep_text_as_typed(typed: str, tmp_path: Path) -> None:
    config = load(tmp_path, f"{JOB}run:\n  checkpoint_dir: {typed}\n  output: {typed}  # where\n")
    assert (config.run.checkpoint_dir, config.run.output) == (typed, typed)
    assert load(tmp_path, JOB, f"run={{checkpoint_dir: {typed}}}").run.checkpoint_dir == typed


@pytest.mark.parametrize("null", ["null", "~", ""])
def test_nothing_stays_nothing(null: str, tmp_path: Path) -> None:
    assert load(tmp_path, JOB + f"run:\n  checkpoint_dir: {null}\n").run.checkpoint_dir is None
    assert (
        load(tmp_path, JOB + "run: {checkpoint_dir: x}\n", f"run.checkpoint_dir={null or 'null'}").run.checkpoint_dir
        is None
    )


@pytest.mark.parametrize("quoted", ["'0010'", '"0010"'])
def test_quotes_are_taken_off_as_in_yaml(quoted: str, tmp_path: Path) -> None:
    assert load(tmp_path, JOB, f"run.output={quoted}").run.output == "0010"
    assert load(tmp_path, f"{JOB}run: {{output: {quoted}}}\n").run.output == "0010"


def test_numbers_and_switches_stay_what_they_are(tmp_path: Path) -> None:
    config = load(tmp_path, f"{JOB}run: {{steps: 3, overwrite: true}}\n", "run.steps=4", "data.sequence_length=16")
    assert (config.run.steps, config.run.overwrite, config.data.sequence_length) == (4, True, 16)


def test_bytes_that_are_no_utf8_get_through_the_command_line(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert load(tmp_path, JOB, f"run.output={name}").run.output == name


def test_a_file_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(JOB.encode() + b"run: {output: caf\xe9}\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(path)


def test_all_keys_of_text_are_found_in_the_schema() -> None:
    keys = text_keys(JobConfig)
    assert {("run", "checkpoint_dir"), ("run", "output"), ("data", "field"), ("model", "hf")} <= keys
    assert ("run", "steps") not in keys
