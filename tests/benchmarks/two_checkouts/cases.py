"""The jobs that must give the same in both checkouts."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tests.benchmarks.two_checkouts.inputs import NUM_STEPS

__all__ = ["CROSSED", "Case", "Start", "Stop", "named", "score"]


@dataclass(frozen=True)
class Stop:
    """A signal in the middle of a start."""

    module: str
    """Class whose call is the moment."""
    call: int
    number: int = signal.SIGTERM
    ranks: Sequence[int] = (0,)


@dataclass(frozen=True)
class Start:
    """One start of some ranks, in the folder of its case."""

    name: str
    arguments: Sequence[str] = ()
    world: int = 1
    program: str | None = None
    """``module:function`` of `side`, in place of the command line."""
    stop: Stop | None = None
    copies: Mapping[str, str] = field(default_factory=dict)
    """What is copied into the folder first: name -> path, ``CASE/NAME``."""
    torchrun: bool = False
    """Start torchrun itself, with new processes."""


@dataclass(frozen=True)
class Case:
    """Starts one after the other in one folder, and the score files that they leave."""

    name: str
    starts: Sequence[Start]
    has_scores: bool = True


TP = ("parallel.tensor=2", "parallel.sequence=true")
PP = ("parallel.pipeline=2",)
CHUNKS = (*PP, "parallel.virtual_pipeline=2")
EP = ("parallel.expert=2",)
BLOCKWISE = "run.blockwise=true"
KEEP = ("run.checkpoint_dir=checkpoints", "run.checkpoint_interval=1")
STOPPED_STEP = 3


def config(name: str) -> str:
    return f"../../inputs/{name}.yaml"


def score(name: str, *overrides: str, start: str = "score", **others: Any) -> Start:
    return Start(start, ("score", config(name), *overrides), **others)


def job(title: str, name: str, *overrides: str, world: int = 1, **others: Any) -> Case:
    return Case(title, (score(name, *overrides, world=world, **others),))


def program(name: str, world: int = 1) -> Case:
    title = name.partition(":")[2].replace("_", " ")
    return Case(f"{title}, {world} ranks" if world > 1 else title, (Start("program", program=name, world=world),))


def own_loop(start: str, copies: Mapping[str, str] | None = None) -> Case:
    program = "checkout_programs:own_loop_with_checkpoints"
    starts = (Start(start, program=program, world=2, copies=copies or {}),)
    return Case(f"{start}, own loop", starts, has_scores=start == "resumed")


def stopped(title: str, *overrides: str, world: int, stop: Stop) -> Case:
    starts = (
        score("all", *KEEP, *overrides, start="stopped", world=world, stop=stop),
        Start("status", ("status", "checkpoints")),
    )
    return Case(title, starts, has_scores=False)


def resumed(title: str, source: str, *overrides: str, world: int) -> Case:
    starts = (
        score("all", *KEEP, *overrides, start="resumed", world=world, copies={"checkpoints": f"{source}/checkpoints"}),
        score("all", *KEEP, *overrides, start="again", world=world),
        Start("status", ("status", "checkpoints")),
    )
    return Case(title, starts)


FULL = [
    job("minitron, one rank", "minitron"),
    job("minitron, TP=2 SP", "minitron", *TP, world=2),
    job("minitron, TP=2 SP, torchrun", "minitron", *TP, world=2, torchrun=True),
    job("minitron, TP=2 SP, bfloat16", "minitron", *TP, "model.dtype=bfloat16", world=2),
    job("minitron, uneven PP", "minitron", *PP, "parallel.pipeline_layers=[1,3]", world=2),
    job("every dense score, one rank", "all"),
    job("every dense score, TP=2 SP, DP=2", "all", *TP, world=4),
    job("every dense score, PP=2, 2 chunks", "all", *CHUNKS, world=2),
    job("every dense score, CP=2", "all", "parallel.context=2", world=2),
    job("every dense score, float64, PP=2 TP=2", "qwen3", *PP, *TP, "model.dtype=float64", world=4),
    job("padded documents, TP=2 SP", "documents", *TP, "run.micro_batch_size=2", world=2),
    job("Mixtral, EP=2", "mixtral", *EP, world=2),
    job("Mixtral, EP=2 ETP=2", "mixtral", *EP, "parallel.expert_tensor=2", "parallel.tensor=2", world=4),
    job("Qwen3-MoE, TP=2 SP, EP=2", "qwen3_moe", *TP, *EP, world=2),
    job("Qwen3-MoE, PP=2", "qwen3_moe", *PP, world=2),
    job("provider, every expert score, TP=2 SP, EP=2", "provided", *TP, *EP, world=2),
    job("provider, fewer KV heads than ranks", "few_heads", "parallel.tensor=4", world=4),
    job("provider, own loop and hooks, TP=2 SP", "looped", *TP, world=2),
    job("Megatron checkpoint, TP=2 SP", "loaded", *TP, world=2),
]
BY_LAYER = [
    job("one layer at a time, every dense score, PP=2", "all", BLOCKWISE, *PP, "run.spool_dir=spool", world=2),
    job("one layer at a time, Qwen3-MoE, EP=2", "qwen3_moe", BLOCKWISE, *EP, world=2),
    job("one layer at a time, Megatron checkpoint, TP=2 SP", "loaded", BLOCKWISE, *TP, world=2),
    job("one layer at a time, padded documents", "documents", BLOCKWISE, "run.micro_batch_size=2"),
]
# A step is four micro-batches: two on each of two data-parallel ranks.
STOPS = [
    stopped("stopped, TP=2 SP, DP=2", *TP, world=4, stop=Stop("GPTModel", 2 * STOPPED_STEP)),
    stopped("killed, one rank", world=1, stop=Stop("GPTModel", 4 * STOPPED_STEP + 2, number=signal.SIGKILL)),
    # In the third layer.
    stopped("stopped, one layer at a time, TP=2", BLOCKWISE, *TP, world=2, stop=Stop("MLP", 2 * 4 * NUM_STEPS + 2)),
    own_loop("stopped"),
]
RESUMED = [
    resumed("resumed on the same layout", "stopped, TP=2 SP, DP=2", *TP, world=4),
    resumed("resumed on PP=2", "stopped, TP=2 SP, DP=2", *PP, world=2),
    resumed("resumed after the kill", "killed, one rank", world=1),
    resumed("resumed, one layer at a time, TP=2", "stopped, one layer at a time, TP=2", BLOCKWISE, *TP, world=2),
    resumed("resumed, one layer at a time, PP=2", "stopped, one layer at a time, TP=2", BLOCKWISE, *PP, world=2),
    own_loop("resumed", {"checkpoints": "stopped, own loop/checkpoints"}),
]
"""Each copies the checkpoints of a case of `STOPS`."""
HOOKS = program("checkout_hooks:hooks_alone")

PROGRAMS = [
    program("checkout_programs:attach_plain"),
    program("checkout_programs:attach_plain", world=2),
    program("checkout_programs:attach_recipe"),
    program("checkout_programs:blockwise"),
    program("checkout_programs:capture"),
    HOOKS,
]

DENSE, TENSOR, EXPERTS = "minitron, one rank", "minitron, TP=2 SP", "Qwen3-MoE, TP=2 SP, EP=2"
SCORES, OTHER, KILLED = "scores.safetensors", "run.output=other", "killed, one rank"


def command(name: str, *arguments: str, copies: Mapping[str, str] | None = None) -> Start:
    return Start(name, arguments, copies=copies or {})


TEXTS = Case(
    "texts",
    (
        command("show", "show", "dense", copies={"dense": f"{DENSE}/{SCORES}", "experts": f"{EXPERTS}/{SCORES}"}),
        command("show experts", "show", "experts", "--fraction", "0.5"),
        command("compare", "compare", "dense", "tensor", "--all", copies={"tensor": f"{TENSOR}/{SCORES}"}),
        command("compare beyond", "compare", "dense", "experts", "--tolerance", "1e-6"),
        command("compare within", "compare", "dense", "tensor", "--tolerance", "1e-3"),
        score("all", "run.steps=0", start="dry run"),
        score("minitron", "run.steps=0", *TP, "parallel.processes=8", start="dry run TP"),
        score("qwen3_moe", "run.steps=0", *EP, *PP, start="dry run experts"),
        score("all", "run.steps=0", BLOCKWISE, *PP, start="dry run by layer"),
        score("provided", "run.steps=0", *EP, start="dry run provider"),
        score("minitron", "run.steps=0", *TP, start="dry run in a world", world=2),
        score("minitron", "run.steps=0", "data.text=nowhere.txt", start="dry run not ready"),
        command("help", "--help"),
        command("help score", "score", "--help"),
        command("version", "--version"),
    ),
    has_scores=False,
)

DAMAGED = "checkpoints/megascore-step-00000009.safetensors"
WRONG: dict[str, tuple[str, Sequence[str]]] = {
    "key": ("all", ["run.stepps=3"]),
    "section": ("all", ["running.steps=3"]),
    "type": ("all", ["run.steps=many"]),
    "not an override": ("all", ["steps"]),
    "yaml": ("no", []),
    "config missing": ("nowhere", []),
    "model missing": ("all", ["model.hf=nowhere"]),
    "no model": ("all", ["model.hf=null"]),
    "text missing": ("all", ["data.text=nowhere.txt"]),
    "two texts": ("all", ["data.tokens=x.npy"]),
    "family": ("unknown", []),
    "dtype": ("all", ["model.dtype=float8"]),
    "target": ("all", ["scores=[{target: fnn}]"]),
    "method": ("all", ["scores=[{target: layers, method: l2_norm}]"]),
    "recipe": ("all", ["scores=minitrom"]),
    "no such part": ("all", ["scores=[{target: experts}]"]),
    "iterations": ("all", ["scores=[{target: ffn, method: iterative_contribution, iterations: 5}]"]),
    "too many steps": ("all", ["run.steps=7"]),
    "data for the model": ("mixtral", ["model.hf=../../inputs/small"]),
    "sequence alone": ("all", ["parallel.sequence=true"]),
    "processes": ("all", ["parallel.processes=4"]),
    "world": ("all", ["parallel.tensor=2"]),
    "dry heads": ("all", ["parallel.tensor=4", "run.steps=0"]),
    "dry layers": ("all", ["parallel.pipeline=3", "run.steps=0"]),
    "dry experts": ("qwen3_moe", ["parallel.expert=3", "run.steps=0"]),
    "dry context": ("all", ["parallel.context=3", "run.steps=0"]),
    "overflow": ("overflowing", []),
    "spool": ("all", ["run.spool_dir=spool"]),
    "provider": ("all", ["model.provider=nowhere:model"]),
    "provider without a name": ("looped", ["run.checkpoint_dir=checkpoints"]),
    "load": ("loaded", ["model.load=../../inputs/llama"]),
}
"""Mistakes in a job of one process."""

ERRORS = Case(
    "errors",
    (
        *(score(name, *overrides, start=f"wrong {what}") for what, (name, overrides) in WRONG.items()),
        score("all", start="output there", copies={SCORES: f"{DENSE}/{SCORES}"}),
        score("all", *KEEP, "run.seed=1", OTHER, start="other seed", copies={"checkpoints": f"{KILLED}/checkpoints"}),
        score("all", *KEEP, "run.global_batch_size=8", OTHER, start="other batch"),
        score("all", *KEEP, BLOCKWISE, OTHER, start="other way"),
        score("all", *KEEP, OTHER, start="damaged checkpoint", copies={DAMAGED: "../inputs/words.txt"}),
        score("all", *TP, "parallel.pipeline=2", start="world of two", world=2),
        score("all", *TP, "data.text=nowhere.txt", OTHER, start="missing on two", world=2),
        command("show missing", "show", "nowhere"),
        command("show foreign", "show", "../../inputs/llama/model.safetensors"),
        command("show text", "show", "../../inputs/words.txt"),
        command("compare missing", "compare", SCORES, "nowhere", "--tolerance", "1"),
        command("status missing", "status", "nowhere"),
        command("usage", "show", SCORES, "--fraction", "25"),
        command("no command"),
        Start("mistakes", program="checkout_mistakes:mistakes"),
    ),
)

SCORED = {case.name.replace(",", "").replace(" ", "-"): f"{case.name}/{SCORES}" for case in (*FULL, *BY_LAYER)}
READ = Case(
    "score files",
    (
        Start(
            "read",
            program="checkout_programs:read_scores",
            copies={f"others/{n}.safetensors": source for n, source in SCORED.items()},
        ),
    ),
)

CASES: list[Case] = [*FULL, *BY_LAYER, *STOPS, *RESUMED, *PROGRAMS, READ, TEXTS, ERRORS]
"""In an order in which each finds what it copies."""

CROSSED: list[Case] = [
    *RESUMED,
    READ,
    Case(HOOKS.name, tuple(replace(start, copies={"old_states": f"{HOOKS.name}/states"}) for start in HOOKS.starts)),
]
"""What the new checkout goes on with from files of the old one, by the names of the cases that must give the same."""


def named(text: str) -> list[Case]:
    """Return the cases with ``text`` in their names, and those whose files they copy."""
    wanted: list[Case] = []
    sources: set[str] = set()
    for case in reversed(CASES):
        if text in case.name or case.name in sources:
            wanted.append(case)
            sources |= {path.partition("/")[0] for start in case.starts for path in start.copies.values()}
    return wanted[::-1]
