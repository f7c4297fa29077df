"""The cost of the hooks, beside the published ones (nvidia-modelopt) on the same tensors in the same run.

    python -m tests.benchmarks.hooks [--threads 2] [--repeats 15] [--alone KvHead] [--device cuda]

Times are medians; the two implementations take turns, so that whatever else the machine does meets both. The published
package is needed here only: ``pip install nvidia-modelopt==0.47.0``. Without it the table has own times alone.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from megascore import hooks
from megascore.hooks import IterativeChannelContributionHook, MomentsHook
from megascore.hooks.registry import methods_of
from megascore.hooks.sharing import together

SEQUENCE, BATCH, CHANNELS, OUTPUTS = 512, 4, 4096, 1024
QUERY_HEADS, KV_HEADS = 32, 8
READING, FORWARD = "reading the input once (sum)", "the layer's forward pass"
PUBLISHED = "modelopt.torch.prune.importance_hooks.base_hooks"

Run = Callable[[], object]
Contest = tuple[str, Run, "Run | None"]


def published_hooks() -> Any:
    """The published module, or None with a line that says how to get it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(PUBLISHED)
    except ImportError as error:
        print(f"No comparison ({error}): pip install nvidia-modelopt==0.47.0", file=sys.stderr)
        return None


def iterative_settings(calibration: str | None) -> dict[str, Any]:
    return {"validation_full_iters": 10**6, "calibration_method": calibration}


def own_iterative(linear: nn.Linear, calibration: str | None, num_pruned: int) -> IterativeChannelContributionHook:
    """A hook that has pruned some channels already, and prunes no more while it is timed."""
    hook = IterativeChannelContributionHook(linear, iterative_settings(calibration))
    # In this schedule each channel is pruned 10^6 / C iterations after the one before.
    state = hook.state_dict()
    pruned = torch.randperm(CHANNELS)[:num_pruned]
    state["statistics"]["prune_position"][pruned] = torch.arange(1, num_pruned + 1)
    state["statistics"]["curr_iter"].fill_(num_pruned * 10**6 // CHANNELS)
    hook.load_state_dict(state)
    return hook


def published_iterative(module: Any, linear: nn.Linear, calibration: str | None, num_pruned: int) -> Any:
    hook = module.IterativeChannelContributionHook(linear, iterative_settings(calibration))
    hook.pruned_channels = torch.randperm(CHANNELS)[:num_pruned].tolist()
    hook.curr_iter = num_pruned * 10**6 // CHANNELS
    return hook


def everything(linear: nn.Linear) -> Any:
    """The hook that keeps what every method of FFN channels needs."""
    of_ffn = [method.hook for method in methods_of("ffn").values()]
    return together(frozenset(hook for hook in of_ffn if issubclass(hook, MomentsHook)))(linear)


def bare_loop(x: Tensor) -> Run:
    """The least that eager operations take for the sum of absolute values: into the cache and out of it, in a loop."""
    matrix = x.view(-1, x.shape[-1])
    parts, rows = torch.get_num_threads(), 48
    scratch = torch.empty(parts, rows, x.shape[-1])
    filled = scratch.view(-1, x.shape[-1])
    total, ones = torch.zeros(parts, 1, x.shape[-1]), torch.ones(parts, 1, rows)
    whole = len(matrix) // (parts * rows) * parts * rows

    def run() -> None:
        for start in range(0, whole, parts * rows):
            read = matrix[start : start + parts * rows]
            if x.dtype == torch.float32:
                torch.abs(read, out=filled)
            else:
                filled.copy_(read).abs_()
            total.baddbmm_(ones, scratch)

    return run


def contests(dtype: torch.dtype, device: str, published: Any) -> list[Contest]:
    x = torch.randn(SEQUENCE, BATCH, CHANNELS).to(device, dtype)
    linear = nn.Linear(CHANNELS, OUTPUTS, bias=False).to(device, dtype).requires_grad_(False)
    norm = nn.LayerNorm(CHANNELS).to(device, dtype).requires_grad_(False)
    y = linear(x)

    def call(hook: Any, module: nn.Module, output: Tensor) -> Run:
        return lambda: hook(module, (x,), output)

    def pair(label: str, module: nn.Module, output: Tensor, name: str, *args: Any) -> Contest:
        own = call(getattr(hooks, name)(*args), module, output)
        return label, own, call(getattr(published, name)(*args), module, output) if published else None

    def iterative(label: str, calibration: str | None, num_pruned: int) -> Contest:
        own = call(own_iterative(linear, calibration, num_pruned), linear, y)
        theirs = published_iterative(published, linear, calibration, num_pruned) if published else None
        return label, own, call(theirs, linear, y) if theirs else None

    config = SimpleNamespace(hidden_size=OUTPUTS, num_attention_heads=QUERY_HEADS, head_dim=CHANNELS // QUERY_HEADS)
    heads = {
        "model": SimpleNamespace(config=config),
        "block_config": SimpleNamespace(attention=SimpleNamespace(num_key_value_heads=KV_HEADS)),
    }
    half, magnitude = CHANNELS // 2, "scale_by_magnitude"
    return [
        (READING, x.sum, None),
        *([("abs and products with ones, a bare loop", bare_loop(x), None)] if device == "cpu" else []),
        (FORWARD, lambda: linear(x), None),
        pair("L2NormHook", linear, y, "L2NormHook"),
        ("the moments of all methods together", call(everything(linear), linear, y), None),
        pair("IndependentChannelContributionHook", linear, y, "IndependentChannelContributionHook", linear),
        pair("LayerNormContributionHook", norm, x, "LayerNormContributionHook", norm, {}),
        iterative("Iterative, nothing pruned", None, 0),
        iterative("Iterative, half pruned", None, half),
        iterative("Iterative, nothing pruned, scale_by_magnitude", magnitude, 0),
        iterative("Iterative, half pruned, scale_by_magnitude", magnitude, half),
        pair(f"IndependentKvHead, {KV_HEADS} heads", linear, y, "IndependentKvHeadContributionHook", linear, heads),
        ("BlockSimilarityHook", call(hooks.BlockSimilarityHook(), norm, x), None),
    ]


def seconds(run: Run, device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(entries: list[Contest], repeats: int, device: str) -> list[tuple[str, float, float | None]]:
    """Median seconds, own and published, of each entry."""
    own: dict[str, list[float]] = {label: [] for label, *_ in entries}
    theirs: dict[str, list[float]] = {label: [] for label, *_ in entries}
    for repeat in range(repeats + 2):
        for label, run, published in entries:
            own_time = seconds(run, device)
            their_time = seconds(published, device) if published else None
            if repeat >= 2:  # the first two warm up
                own[label].append(own_time)
                theirs[label] += [] if their_time is None else [their_time]
    return [
        (label, statistics.median(own[label]), statistics.median(theirs[label]) if theirs[label] else None)
        for label, *_ in entries
    ]


def table_of(title: str, rows: list[tuple[str, float, float | None]]) -> Table:
    table = Table("", "own ms", "published ms", "times faster", "x reading", "x forward", title=title)
    times = {label: own for label, own, _ in rows}
    reading, forward = times[READING], times[FORWARD]
    for label, own, theirs in rows:
        compared = (f"{theirs * 1e3:.1f}", f"{theirs / own:.1f}") if theirs else ("", "")
        table.add_row(label, f"{own * 1e3:.2f}", *compared, f"{own / reading:.1f}", f"{own / forward:.2f}")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--alone", default="", help="entry to time without its published hook, such as KvHead: it is slow"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    published = published_hooks()
    shape = f"input [{SEQUENCE}, {BATCH}, {CHANNELS}], weight [{OUTPUTS}, {CHANNELS}], {options.threads} threads"
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            entries = contests(dtype, options.device, published)
            if options.alone:
                entries = [(n, own, None if options.alone in n else theirs) for n, own, theirs in entries]
            rows = measure(entries, options.repeats, options.device)
            Console(width=140).print(
                table_of(f"{str(dtype).removeprefix('torch.')} on {options.device}: {shape}", rows)
            )


if __name__ == "__main__":
    main()
