"""Memory of prune is that of blocks, whatever the size and number of the files; the index tells of each tensor once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import megascore
from megascore.pruning.pick import BLOCK_BYTES
from tests.models import save_checkpoint, tensors_of
from tests.smaller import random_plan

pytestmark = pytest.mark.fast

PRUNE = """
import sys, threading
import megascore

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

plan = megascore.load_plan(sys.argv[1])
megascore.prune(sys.argv[4], megascore.load_plan(sys.argv[3]), sys.argv[5])  # what is loaded at the first call
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
megascore.prune(plan.model, plan, sys.argv[2])
done.set()
thread.join()
print((peak - before) * 1024)
"""


def peak_of(folder: Path, small: Path) -> int:
    """Return the bytes that a fresh process has more while it prunes a folder, after it has pruned a small one."""
    work = folder.parent
    random_plan(folder, ffn="75%", hidden_size="90%").save(work / f"{folder.name}.yaml")
    random_plan(small, ffn="75%").save(work / "small.yaml", overwrite=True)
    outputs = [work / f"{folder.name} pruned", work / f"small beside {folder.name}"]
    arguments = [work / f"{folder.name}.yaml", outputs[0], work / "small.yaml", small, outputs[1]]
    command = [sys.executable, "-c", PRUNE, *arguments]
    told = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    shutil.rmtree(outputs[0])
    return told


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's own memory")
def test_the_memory_is_that_of_blocks(tmp_path: Path) -> None:
    # 128 MB of weights, the largest tensor of 48 MB.
    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 1, "vocab_size": 1024}
    folder = save_checkpoint(tmp_path / "large", "qwen2", **sizes)
    small = save_checkpoint(tmp_path / "small", "qwen2")
    told = peak_of(folder, small)
    # Two blocks each as read, with kept rows, and with kept columns; as much again for Python and its allocator.
    assert told < 2 * 6 * BLOCK_BYTES


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's own memory")
def test_the_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    small = save_checkpoint(tmp_path / "small", "qwen2")
    sizes = {"hidden_size": 512, "intermediate_size": 6144, "vocab_size": 256}
    peaks, shards = [], []
    for num_layers in (2, 8):
        # A layer is 39 MB of weights, and a file of its own.
        folder = save_checkpoint(
            tmp_path / f"{num_layers} layers", "qwen2", **sizes, num_hidden_layers=num_layers, max_shard_size="42MB"
        )
        shards.append(len(list(folder.glob("*.safetensors"))))
        peaks.append(peak_of(folder, small))
    assert shards[1] >= 3 * shards[0] >= 6, shards
    # Four times the weights. Blocks of one size are most of it: a half more is for lists of names, and for when the
    # watcher looks. A model or a file in memory would be far above.
    assert peaks[1] < 1.5 * peaks[0] + BLOCK_BYTES, peaks


def test_the_index_names_each_tensor_once_in_the_file_that_holds_it(tmp_path: Path) -> None:
    parent = save_checkpoint(tmp_path / "parent", "qwen3_moe", max_shard_size="100KB")
    megascore.prune(parent, random_plan(parent, ffn=56, hidden_size=40, layers=3), tmp_path / "smaller")
    text = (tmp_path / "smaller" / "model.safetensors.index.json").read_text()
    pairs: list[str] = []

    def keys(found: list[tuple[str, object]]) -> dict[str, object]:
        pairs.extend(name for name, _ in found)
        return dict(found)

    index = json.loads(text, object_pairs_hook=keys)
    assert len(pairs) == len(set(pairs)), "no key is there twice"
    stored = {
        name: (path.name, tensor)
        for path in (tmp_path / "smaller").glob("*.safetensors")
        for name, tensor in tensors_of(path).items()
    }
    assert index["weight_map"] == {name: file for name, (file, _) in stored.items()}
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for _, t in stored.values())
