"""Pages say what is true: their code runs, their commands, links and names exist, their tables are the code's."""

from __future__ import annotations

import pkgutil
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import megascore
from megascore.config import JobConfig, load_config
from megascore.hooks.registry import methods
from megascore.sites.requests import names_of_methods
from megascore.sites.targets import TARGETS
from tests.commands import check_command, commands
from tests.models import save_checkpoint
from tests.pages import PAGES, ROOT, Block, blocks, code_spans, headings, links, name_of, prose, rows

README = ROOT / "README.md"
CONTRIBUTING = ROOT / ".github" / "CONTRIBUTING.md"
MAX_LINES, MAX_WORDS_OF_GLOSSARY = 200, 24

BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = ("bash launch/", "python -m ", "megascore ", "torchrun --", "sbatch ")
"""Beginnings of inline code that is a command."""
NOT_RUN = {
    "docker/README.md": ["bash"],
    "megascore/parallel/README.md": ["python"],
    "tests/README.md": ["python"],
}
"""Languages of blocks that are not run, by page; each names its reason in the page."""
REPLACED = {
    "/models/Llama-3.1-8B": "model",
    '"cuda"': '"cpu"',
    "1000": "2",
    '.save("scores.safetensors")': '.save("scores.safetensors", overwrite=True)',
}
"""What a reader has and a test has not, in Python blocks: a path, a device, a number of steps, no score file yet."""

every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
fast = pytest.mark.fast


def those(language: str) -> Any:
    return pytest.mark.parametrize(
        "block", [block for block in BLOCKS if block.language == language and block.reason is None], ids=str
    )


@fast
def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MAX_LINES
    assert "Not run so far" in README.read_text().split("## ")[0], "the first screen says what was never run"


@fast
def test_no_example_in_a_docstring_is_skipped() -> None:
    sources = (ROOT / "megascore").rglob("*.py")
    assert [name_of(source) for source in sources if "doctest: +SKIP" in source.read_text()] == []


@fast
def test_every_block_has_a_language_that_is_checked() -> None:
    assert [str(block) for block in BLOCKS if block.language not in ("bash", "python", "text", "yaml")] == []
    skipped: dict[str, list[str]] = {}
    for block in BLOCKS:
        if block.reason is not None:
            skipped.setdefault(block.page, []).append(block.language)
    assert skipped == NOT_RUN


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    (tmp_path / "stub.yaml").write_text("model: {hf: model}\ndata: {text: text.txt}\n")
    return tmp_path / "stub.yaml"


@fast
@those("bash")
def test_commands_exist_as_they_are_shown(block: Block, stub: Path) -> None:
    for words in commands(block.text):
        check_command(words, stub)


@fast
@every_page
def test_commands_in_sentences_exist(page: Path, stub: Path) -> None:
    for span in code_spans(page):
        # 'megascore score' alone is a name.
        if span.startswith(COMMANDS) and not re.fullmatch(
            r"megascore (score|show|compare|plan|prune|evaluate|search)", span
        ):
            check_command(shlex.split(span), stub)


@fast
@those("yaml")
def test_configs_are_taken(block: Block, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(block.text)
    load_config(tmp_path / "job.yaml")


@fast
@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert not anchor or anchor in headings(path), link


@fast
@every_page
def test_paths_and_keys_in_sentences_exist(page: Path) -> None:
    keys = {key for key, _ in config_keys()}
    for span in code_spans(page):
        if re.fullmatch(r"(\.github|docker|launch|megascore|tests)/[\w./-]+", span):
            assert (ROOT / span).exists(), span
        key = re.fullmatch(r"((model|data|parallel|run)\.\w+)(=\S+)?", span)
        assert key is None or key[1] in keys, span


@every_page
def test_names_in_sentences_exist(page: Path) -> None:
    for name in re.findall(r"`(megascore(?:\.\w+)+)", prose(page)):
        pkgutil.resolve_name(name)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("pages") / "model", "llama")


@pytest.fixture
def reader(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What a reader of a page has, by name; in a working directory with a model and a score file."""
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokens = torch.arange(32).reshape(2, 2, 8)
    with megascore.attach(model) as run:
        model(tokens[0])
        run.step()
    run.finish().save("scores.safetensors")
    has = {
        "__name__": "tests.reader",
        "megascore": megascore,
        "model": model,
        "layer": nn.Linear(8, 4),
        "batches": list(tokens),
        "loader": [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in tokens],
        "forward_step": lambda batch: model(batch["input_ids"]),
        "folder": "model",
        "channels": torch.arange(3),
    }
    yield has
    for value in has.values():
        if isinstance(value, type) and value.__module__ == "tests.reader" and "measures" in vars(value):
            # A score that a page defines is one of the registry's as long as its class exists.
            del value.measures


@every_page
def test_python_blocks_run(page: Path, reader: dict[str, Any]) -> None:
    for block in BLOCKS:
        if block.page == name_of(page) and block.language == "python" and block.reason is None:
            text = re.sub("|".join(map(re.escape, REPLACED)), lambda found: REPLACED[found[0]], block.text)
            exec(compile(text, str(block), "exec"), reader)


@fast
def test_the_readme_has_the_table_of_targets_and_methods() -> None:
    own = [method for method in methods().values() if method.hook.__module__.startswith("megascore.hooks.")]
    of_package = {method.name for method in own}
    targets = [
        [f"`{name}`", target.title, target.where, code(m for m in names_of_methods(name) if m in of_package)]
        for name, target in TARGETS.items()
    ]
    summaries = {(method.name, method.targets): method.summary for method in own}
    scores = [[f"`{name}`", code(of), summary] for (name, of), summary in summaries.items()]
    shown = rows(README, "What is scored")
    assert [row for row in shown if len(row) == 4][1:] == targets
    assert sorted(rows(ROOT / "megascore/hooks/README.md", "Methods")[1:]) == sorted(scores)


def code(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def config_keys() -> Iterator[tuple[str, Any]]:
    """Yield each key of a job's config with its default."""
    for section in fields(JobConfig):
        value = getattr(JobConfig(), section.name)
        if is_dataclass(value):
            yield from ((f"{section.name}.{key.name}", getattr(value, key.name)) for key in fields(value))
        else:
            yield section.name, value


@fast
def test_the_table_of_config_keys_is_whole() -> None:
    shown = [(key.strip("`"), default) for key, default, _ in rows(ROOT / "megascore/job/README.md", "Config keys")[1:]]
    assert sorted(key for key, _ in shown) == sorted(key for key, _ in config_keys())
    defaults = {key: default for key, default in config_keys() if default is not None}
    for key, default in shown:
        # null is told in words.
        value = defaults.get(key)
        assert value is None or default == f"`{str(value).lower() if isinstance(value, bool) else value}`", key


@fast
def test_the_map_has_every_room_in_its_order() -> None:
    from tests.test_imports import ROOMS

    on_map = [room for row in rows(CONTRIBUTING, "Map of the rooms")[1:] for room in re.findall(r"`(\w+)`", row[0])]
    assert on_map == list(ROOMS)


@fast
def test_the_glossary_is_short_and_says_each_word_once() -> None:
    words = [word.strip() for row in rows(CONTRIBUTING, "Glossary")[1:] for word in row[0].split(",")]
    assert len(set(words)) == len(words) <= MAX_WORDS_OF_GLOSSARY
