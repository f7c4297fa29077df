"""The tables that people read, as text."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

from megascore.scores.charts import Histogram, IndexList, format_ranges
from megascore.scores.report import format_layout, render_scores
from megascore.scores.score_file import Scores

NUM_LAYERS = 30


def make_scores() -> Scores:
    values = {"decoder/layers/block_similarity": torch.linspace(0.9, 0.1, NUM_LAYERS)}
    for layer in range(NUM_LAYERS):
        values[f"decoder.layers.{layer}.mlp.linear_fc2/ffn/l2_norm"] = torch.arange(1.0, 1537.0)
        values[f"decoder.layers.{layer}.self_attention.linear_proj/attention_heads/l2_norm"] = torch.arange(1.0, 10.0)
        values[f"decoder.layers.{layer}.input_layernorm/hidden_size/l2_norm"] = torch.ones(576)
    values["decoder/hidden_size/l2_norm"] = torch.arange(576.0) + 1
    metadata = {
        "model": {"name": "tiny [bold]", "num_layers": NUM_LAYERS, "num_kv_heads": 3},
        "num_tokens": 8192,
        "loss": 3.42,
        "layout": {"tensor": 3, "pipeline": 1, "sequence": True},
    }
    unseen = {"decoder.layers.3.mlp.linear_fc2/ffn/l2_norm": [0, 1, 2, 7], "decoder.layers.99.x/ffn/l2_norm": "all"}
    return Scores(values, metadata, unseen)


def render(scores: Scores, width: int = 100, fraction: float = 0.25, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    Console(file=stream, width=width).print(render_scores(scores, fraction))
    stream.seek(0)
    return stream.read()


def lines_with(text: str, pattern: str) -> list[str]:
    return [line for line in text.splitlines() if re.search(pattern, line)]


def test_the_run_is_named() -> None:
    text = render(make_scores())
    for part in ("tiny [bold]", "8,192 tokens", "3.4200 nats per token", "tensor 3, sequence parallel"):
        assert part in text


@pytest.mark.parametrize("width", [80, 120])
def test_each_layer_and_target_has_one_line_that_fits(width: int) -> None:
    text = render(make_scores(), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text
    assert len(lines_with(text, r"^ +\d+ +153[26] ")) == NUM_LAYERS
    assert len(lines_with(text, r"^ +\d+ +9 ")) == NUM_LAYERS
    assert len(lines_with(text, r"^ +all +576 ")) == 1
    (first,) = lines_with(text, r"^ +0 +1536 ")
    # min, median, max, p90/p10 of 1..1536, and the first of its quarter.
    assert re.search(r" 1 +768 +1536 +8\.9\d .* 384: 0 1 ", first)


def test_a_group_too_small_for_the_fraction_says_so() -> None:
    text = render(make_scores(), 120)
    assert "25 % of 3 is less than one head, so none goes; one of each group does from 34 %" in text
    assert all(" none" in line for line in lines_with(text, r"^ +\d+ +9 "))
    more = render(make_scores(), 120, fraction=0.34)
    assert "less than one" not in more
    assert len(lines_with(more, "3: 0 3 6")) == NUM_LAYERS


def test_the_layers_that_go_first_are_marked() -> None:
    lines = lines_with(render(make_scores()), r"^ +\d+ +0\.\d+ +\d+ ")
    assert len(lines) == NUM_LAYERS
    assert [int(line.split()[0]) for line in lines if "goes" in line] == list(range(23, 30))


def test_what_no_token_reached_is_listed() -> None:
    text = render(make_scores())
    assert lines_with(text, r"decoder\.layers\.3\.mlp\.linear_fc2/ffn/l2_norm +0-2, 7")
    assert lines_with(text, r"decoder\.layers\.99\.x/ffn/l2_norm +all")


def test_a_log_without_block_characters_gets_ascii() -> None:
    text = render(make_scores(), encoding="ascii")
    assert text.isascii()
    assert lines_with(text, r"^\| +0 .*####")


def test_a_file_with_nothing_measured_still_shows() -> None:
    assert "not measured" in render(Scores({}, {}, {"a/ffn/x": "all"}))


def test_scores_that_are_all_alike_still_show() -> None:
    text = render(Scores({"decoder.layers.0.mlp.linear_fc2/ffn/l2_norm": torch.zeros(8)}, {}))
    assert lines_with(text, r"^ +0 +8 +0 +0 +0 +1 ")


def test_histograms_count_every_value_once() -> None:
    assert Histogram(torch.tensor([1.0, 10.0, 100.0, 1000.0]), num_bins=3).bin_counts() == [1, 1, 2]
    assert Histogram(torch.tensor([0.0, 1.0, 2.0]), num_bins=2).bin_counts() == [1, 2]
    assert Histogram(torch.tensor([5.0, 5.0]), num_bins=2).bin_counts() == [2, 0]


def test_index_lists_fill_the_width_and_say_what_is_left_out() -> None:
    indices = IndexList([10, 20, 30])
    assert indices.fitted(100) == "3: 10 20 30"
    assert indices.fitted(11) == "3: 10 20 30"
    assert indices.fitted(10) == "3: 10 .."
    assert indices.fitted(0) == "3: 10 .."
    assert IndexList([]).fitted(10) == "0"


def test_ranges_and_layouts_read_well() -> None:
    assert format_ranges([0, 1, 2, 7, 9, 10]) == "0-2, 7, 9-10"
    assert format_layout({"tensor": 1, "pipeline": 2, "data": 4, "sequence": False}) == "pipeline 2, data 4"
    assert format_layout({"tensor": 1}) == "one process"


def test_what_is_not_scored_is_listed_once_for_all_layers_that_lack_it() -> None:
    scores = make_scores()
    names = {f"decoder.layers.{layer}.mixer": "Mamba" for layer in range(NUM_LAYERS)}
    text = render(Scores(dict(scores), {**scores.metadata, "not_scored": names}))
    assert len(lines_with(text, r"decoder\.layers\.\*\.mixer +Mamba \(30 layers\)")) == 1
    assert "not scored" not in render(scores)
