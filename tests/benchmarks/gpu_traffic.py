"""What hooks cost a GPU by count: ``python -m tests.benchmarks.gpu_traffic``. Needs no GPU, and measures none.

Layers of Llama-3-8B's and 70B's shapes run on the meta device, 8,192 tokens in bfloat16; the
figures are those of the hooks of one layer; the model's last norm is in none of them, nor is the end of a step.

Counting rules:

- Every operator that PyTorch dispatches is one launch, but for views and allocations. A reduction, a sort and a product
  are one too, though libraries may need two or three.
- An operator reads its arguments and writes its results, each number once: of an expanded tensor those that exist. What
  an in-place operator changes is read and written, an ``out=`` or a target of a copy or fill is only written.
- Bytes are those between the memory and the kernel. Nothing is assumed to stay in a cache between two kernels.
- Products are two operations for each multiply-add, `torch.mm` and its like.
- Temporaries are the largest number of bytes that hooks hold allocate and hold at any time, accumulators aside.
- Time is bytes / (80 % of the bandwidth) for each operator, or its products / (70 % of the FLOP/s) where that is more.
  The plain layer takes its products alone, attention as one causal sequence. Nothing overlaps, and launches are free;
  the last column has the ratio where each costs `LAUNCH_SECONDS`.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megascore.hooks import IterativeChannelContributionHook
from megascore.kernels import pairs_of_rows
from megascore.runs.scoring_run import ScoringRun
from megascore.sites.plain import PlainModelView
from megascore.sites.requests import ScoreRequest, recipe

__all__ = ["GPUS", "SHAPES", "Cost", "Shape", "cost_of_layer"]

NUM_TOKENS = 8192
BANDWIDTH_SHARE, FLOPS_SHARE = 0.8, 0.7
GPUS = {"H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}
"""Bytes and dense bfloat16 operations a second, by NVIDIA's data sheets of the SXM forms."""
LAUNCH_SECONDS = 2e-6
"""Of a kernel too small to fill a GPU, where nothing else runs meanwhile: an assumption."""
NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
WRITE_ONLY = {"copy_", "fill_", "zero_"}
CREATE = {"new_full", "new_zeros", "new_ones", "zeros_like", "ones_like", "full_like"}
"""Operators that take a tensor for its shape and kind alone."""
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
"""Operators of products, and the position of the first factor."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int

    @property
    def bytes_once(self) -> int:
        """Bytes of the activations at which hooks sit: both projections' inputs, two norms, the layer's two ends."""
        return 2 * NUM_TOKENS * (self.ffn + 5 * self.hidden)

    @property
    def flops(self) -> float:
        """Operations of a plain forward pass of one layer, one causal sequence."""
        head = self.hidden // self.heads
        weights = self.hidden * (2 * self.hidden + 2 * self.kv_heads * head + 3 * self.ffn)
        return 2.0 * NUM_TOKENS * weights + 2.0 * NUM_TOKENS**2 * self.hidden


SHAPES = {"8B": Shape(4096, 14336, 32, 8), "70B": Shape(8192, 28672, 64, 8)}


@dataclass
class Cost:
    """What hooks do in one layer."""

    launches: int = 0
    read: int = 0
    written: int = 0
    products: int = 0
    temporaries: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    def ratio(self, shape: Shape, gpu: str, launch: float = 0.0) -> float:
        """Return the time of a scored pass over that of a plain one, launches of ``launch`` seconds each."""
        plain = shape.flops / (FLOPS_SHARE * GPUS[gpu][1])
        return 1 + (self.seconds[gpu] + self.launches * launch) / plain


def seconds_of(num_bytes: float, products: float, gpu: str) -> float:
    """Return how long an operator takes."""
    bandwidth, flops = GPUS[gpu]
    return max(num_bytes / (BANDWIDTH_SHARE * bandwidth), products / (FLOPS_SHARE * flops))


class Count(TorchDispatchMode):
    """Counts what runs inside; see the rules of this module."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.read = self.written = self.products = self.in_use = self.peak = 0
        self.seconds = dict.fromkeys(GPUS, 0.0)
        self.names: dict[str, int] = {}
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _elsewhere(t)}
        for tensor in results:
            if _elsewhere(tensor) and tensor.untyped_storage()._cdata not in given:
                self._hold(tensor)
        if (
            func.is_view
            or name in NO_KERNEL
            or not any(_elsewhere(t) for t in (*results, *tree_leaves((args, kwargs))))
        ):
            return result
        written, read = [t for t in results if _elsewhere(t)], []
        for number, argument in enumerate(func._schema.arguments):
            value = kwargs.get(argument.name, args[number] if number < len(args) else None)
            tensors = [t for t in tree_leaves(value) if _elsewhere(t)]
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and not written:
                written = tensors  # Of operators on lists, which return nothing.
            if name in CREATE:
                continue
            if not is_written or not (argument.is_out or name in WRITE_ONLY or name.startswith("_foreach_copy")):
                read += tensors
        self.add(name, sum(map(_num_bytes, read)), sum(map(_num_bytes, written)), _products(name, args))
        return result

    def add(self, name: str, read: int, written: int, products: int = 0) -> None:
        """Count one launch."""
        self.names[name] = self.names.get(name, 0) + 1
        self.launches += 1
        self.read += read
        self.written += written
        self.products += products
        for gpu in GPUS:
            self.seconds[gpu] += seconds_of(read + written, products, gpu)

    def cost(self) -> Cost:
        """Return what was counted."""
        return Cost(self.launches, self.read, self.written, self.products, self.peak, self.seconds)

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self.in_use += num_bytes
            self.peak = max(self.peak, self.in_use)
            self._storages[key] = weakref.finalize(storage, self._free, key, num_bytes)

    def _free(self, key: int, num_bytes: int) -> None:
        del self._storages[key]
        self.in_use -= num_bytes


def _elsewhere(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def _num_bytes(tensor: Tensor) -> int:
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(sizes) * tensor.itemsize


def _products(name: str, args: Any) -> int:
    if name not in PRODUCTS:
        return 0
    x, y = args[PRODUCTS[name] :][:2]
    return 2 * int(x.numel()) * int(y.shape[-1])


@contextmanager
def _fused_kernels(count: Count) -> Iterator[None]:
    """Let hooks take the kernels that CUDA has: each reads its arguments once and writes its result."""

    def cosines(x: Tensor, y: Tensor) -> Tensor:
        count.add("cosines", _num_bytes(x) + _num_bytes(y), 4 * len(x))
        with torch.utils._python_dispatch._disable_current_modes():
            return torch.empty(len(x), dtype=torch.float32, device="meta")

    own = pairs_of_rows.can_fuse, pairs_of_rows.cosines
    pairs_of_rows.can_fuse, pairs_of_rows.cosines = (lambda x, y: True), cosines
    try:
        yield
    finally:
        pairs_of_rows.can_fuse, pairs_of_rows.cosines = own


@contextmanager
def _counting_hooks(run: ScoringRun, count: Count) -> Iterator[None]:
    """Count what the hooks of the first layer do, and nothing that the model does between them."""
    modules = {site.place.module: None for site in run.sites if site.place.name.startswith("decoder.layers.0")}
    handles = []
    for module in modules:
        # Hooks run in the order of registration: the module's own stand between these two.
        handles.append(module.register_forward_hook(lambda *_: count.__enter__() and None, prepend=True))
        handles.append(module.register_forward_hook(lambda *_: count.__exit__(None, None, None)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def make_model(shape: Shape) -> nn.Module:
    """Return a Llama of one layer on the meta device."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=64,
    )
    with torch.device("meta"):
        return LlamaModel(config).bfloat16().eval()


def cost_of_layer(shape: Shape, requests: Iterable[ScoreRequest]) -> Cost:
    """Count what hooks do in a forward pass of one layer."""
    model = make_model(shape)
    tokens = torch.zeros(1, NUM_TOKENS, dtype=torch.long, device="meta")
    # A mask of the model's own shape is taken as it is; another would be looked at, and has no content.
    inside = {"attention_mask": torch.ones(1, 1, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool, device="meta")}
    count = Count()
    with torch.no_grad(), ScoringRun(PlainModelView(model), tuple(requests)) as run:
        with _fused_kernels(count), _counting_hooks(run, count):
            model(tokens, use_cache=False, **inside)
    return count.cost()


def cost_of_iteration(shape: Shape, calibration: str | None, num_done: int) -> Cost:
    """Count a call of the iterative hook after ``num_done`` of 4 iterations, each of which prunes a quarter.

    Without a run, whose step asks the device for the number of tokens, which has no content here.
    """
    options = {"validation_full_iters": 4, "calibration_method": calibration}
    count = Count()
    with torch.no_grad(), torch.device("meta"):
        layer = nn.Linear(shape.ffn, shape.hidden, bias=False, dtype=torch.bfloat16)
        hook = IterativeChannelContributionHook(layer, options)
        x = torch.empty(NUM_TOKENS, 1, shape.ffn, dtype=torch.bfloat16)
        y = torch.empty(NUM_TOKENS, 1, shape.hidden, dtype=torch.bfloat16)
        for _ in range(num_done):
            hook.observe(x, y)
        with count:
            hook.observe(x, y)
    return count.cost()


RECIPES = ("low_loss", "minitron", "all")


def rows(shape: Shape) -> Iterator[tuple[str, Cost]]:
    """Yield the name and the cost of each recipe, of each score alone, and of the iterative one half way."""
    for name in RECIPES:
        # A model with experts has scores that this one has no modules for.
        yield name, cost_of_layer(shape, recipe(name))
    for request in recipe("all"):
        if request.target not in ("experts", "expert_ffn", "shared_expert_ffn"):
            yield f"{request.target}/{request.method}", cost_of_layer(shape, [request])
    for calibration in (None, "scale_by_magnitude"):
        name = "ffn/iterative_contribution" + (", calibrated" if calibration else "")
        for num_done, words in ((0, "nothing pruned"), (2, "half pruned")):
            yield f"{name}, {words}", cost_of_iteration(shape, calibration, num_done)


def main() -> None:
    """Print one table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="only this one")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each row, in place of tables")
    options = parser.parse_args()
    for name, shape in SHAPES.items():
        if options.shape in (None, name):
            show(name, shape, as_json=options.json)


def show(name: str, shape: Shape, *, as_json: bool) -> None:
    """Print the rows of one shape."""
    once = shape.bytes_once
    plain = shape.flops / FLOPS_SHARE
    if not as_json:
        alone = (f"{1 + seconds_of(once, 0, gpu) * flops / plain:.4f} on {gpu}" for gpu, (_, flops) in GPUS.items())
        print(f"\nLlama-3-{name}: each activation once is {once / 1e6:.0f} MB a layer, alone {', '.join(alone)}")
        gpus = " | ".join(f"{gpu} ratio" for gpu in GPUS)
        print(f"| scores | MB | times once | launches | GFLOP | MB held | {gpus} | H100, launches of 2 us |")
        print("|---|---|---|---|---|---|---|---|---|")
    for label, cost in rows(shape):
        num_bytes = cost.read + cost.written
        ratios = {gpu: cost.ratio(shape, gpu) for gpu in GPUS}
        with_launches = cost.ratio(shape, "H100", LAUNCH_SECONDS)
        if as_json:
            row = {"shape": name, "scores": label, "bytes": num_bytes, "times_once": num_bytes / once}
            row |= {"launches": cost.launches, "products": cost.products, "held": cost.temporaries}
            print(json.dumps({**row, "ratios": ratios, "ratio_with_launches": with_launches}))
            continue
        numbers = [f"{num_bytes / 1e6:.0f}", f"{num_bytes / once:.3f}", str(cost.launches)]
        numbers += [f"{cost.products / 1e9:.0f}", f"{cost.temporaries / 1e6:.0f}"]
        numbers += [*(f"{ratio:.4f}" for ratio in ratios.values()), f"{with_launches:.4f}"]
        print(f"| {label} | {' | '.join(numbers)} |")


if __name__ == "__main__":
    main()
