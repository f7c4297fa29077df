"""What scores are worth: the rise of the loss when each says what goes, on a real model and a small one with experts.

    python -m tests.benchmarks.quality [--only ffn/25%] [--model FOLDER] [--samples 32] [--held-out 16] [--json FILE]
    python -m tests.benchmarks.quality --compensate --only ffn/25%
    python -m tests.benchmarks.quality --experts

Scores come from one pass over the shipped text with ``scores: all``, losses from another novel, by masks in the parent,
without training. Each rise has a standard error, paired by sample. The published hooks (nvidia-modelopt) are those of
``l2_norm`` and ``independent_contribution``, which give the same order; ``random`` is the floor of every target.
Without ``--model`` it is SmolLM2-135M. With ``--compensate`` each model without FFN channels, heads or experts is
made, too, its projections fitted by least squares to the scored text, and run in transformers: minutes for each row.
With ``--experts`` a model of 6 layers with 16 experts each is trained first, for some minutes, on text of the same
novels that is neither scored nor evaluated.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import megascore
from launch import smollm2
from megascore.api.attach import view_of
from megascore.evaluation.statistics import Estimate, ratio
from megascore.masks.masked import masked_view
from megascore.plans.choose import choose_units
from megascore.plans.orders import ScoreOrders
from megascore.plans.parent import Parent
from megascore.plans.sizes import sizes_of_parent
from megascore.sites.requests import names_of_methods

TEXT = Path(__file__).parents[2] / "launch" / "text"
LENGTH = 256


@dataclass(frozen=True)
class Cut:
    """A part of one target that goes, in every layer."""

    target: str
    part: float
    title: str


CUTS = (
    *(Cut("ffn", part, f"{100 * part:.0f} % of the FFN channels") for part in (0.1, 0.25, 0.4)),
    Cut("attention_heads", 1 / 3, "one query head of three in each KV group"),
    Cut("kv_heads", 1 / 3, "one KV head of three with its query heads"),
    *(Cut("hidden_size", part, f"{100 * part:.0f} % of the hidden features") for part in (0.05, 0.1)),
    *(Cut("layers", number / 30, f"{number} of 30 layers") for number in (3, 6)),
)
EXPERT_CUTS = tuple(
    Cut(target, part, f"{100 * part:.0f} % of the {what}")
    for target, what in (("experts", "experts"), ("expert_ffn", "channels of each expert"))
    for part in (0.25, 0.5)
)


class Row(NamedTuple):
    """One cut by one method."""

    cut: Cut
    method: str
    rise: Estimate
    """Of the loss in nats per token."""
    compensated: Estimate | None
    """The same of the smaller model, its projections fitted again; None where that was not tried."""


COMPENSATED = ("ffn", "attention_heads", "kv_heads", "experts", "expert_ffn")


class Trial:
    """A parent, its scores, and held-out samples on which it is compared with itself under masks."""

    def __init__(self, folder: Path, scored: Tensor, held_out: Tensor, num_steps: int) -> None:
        self.parent = Parent.of(folder)
        self.model = load(folder)
        self.folder, self.scored, self.held_out = folder, scored, held_out
        with megascore.attach(self.model, scores="all") as run, torch.no_grad():
            for step in scored.chunk(num_steps):
                self.model(input_ids=step)
                run.step()
        self.scores = run.finish()
        self.losses = self._losses()

    def rise(self, cut: Cut, method: str) -> Estimate:
        """The rise of the loss in nats per token, when what ``method`` ranks lowest goes."""
        orders = ScoreOrders(self.scores, {cut.target: method})
        before = sizes_of_parent(self.parent.config)
        kept = round(before[cut.target] * (1 - cut.part))
        units = choose_units(self.parent.config, {**before, cut.target: kept}, orders)
        with masked_view(view_of(self.model), units, before["attention_heads"]):
            return self.compared(self._losses())

    def compensated_rise(self, cut: Cut, method: str) -> Estimate:
        """The same of the smaller model, its output projections fitted by least squares to the scored text."""
        kept = round(sizes_of_parent(self.parent.config)[cut.target] * (1 - cut.part))
        plan = megascore.plan(
            self.scores,
            **{cut.target: kept},
            multiple_of=1,
            methods={cut.target: method},
            model=self.folder,
            same_weights=True,
        )
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            plan.save(root / "plan.yaml")
            (root / "text.jsonl").write_text("\n".join(json.dumps({"ids": row.tolist()}) for row in self.scored))
            (root / "job.yaml").write_text(
                f"model: {{hf: '{self.folder}', dtype: float32}}\n"
                f"data: {{jsonl: '{root / 'text.jsonl'}', field: ids, packing: false, sequence_length: {LENGTH}}}\n"
                "run: {device: cpu, global_batch_size: 2}\n"
            )
            megascore.compensate(root / "job.yaml", root / "plan.yaml", root / "smaller")
            return self.compared(losses_of(load(root / "smaller"), self.held_out))

    def compared(self, losses: Tensor) -> Estimate:
        """The rise of losses [samples] over those of the parent."""
        tokens = torch.full_like(losses, self.held_out.shape[1] - 1)
        return ratio(losses - self.losses, tokens)

    @torch.no_grad()
    def _losses(self) -> Tensor:
        return losses_of(self.model, self.held_out)


@torch.no_grad()
def losses_of(model: nn.Module, samples: Tensor) -> Tensor:
    """Negative log-likelihood of each sample [samples] float64, added up over its tokens."""
    found = []
    for part in samples.split(2):
        logits = model(input_ids=part).logits[:, :-1].float()
        nats = nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
        found.append(nats.double().sum(1))
    return torch.cat(found)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def samples_of(folder: Path, text: Path, first: int, number: int) -> Tensor:
    """Samples [number, LENGTH] of a text, from the given one on."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(text.read_text(), verbose=False)["input_ids"]
    part = tokens[first * LENGTH : (first + number) * LENGTH]
    return torch.tensor(part).view(-1, LENGTH)


def measure(trial: Trial, cuts: Sequence[Cut], options: argparse.Namespace) -> Iterator[Row]:
    targets = {key.split("/")[1] for key in trial.scores}
    there = {tuple(key.split("/")[1:]) for key in trial.scores}
    for cut in cuts:
        if cut.target not in targets or (options.only and options.only not in f"{cut.target}/{cut.title}"):
            continue
        for method in names_of_methods(cut.target):
            if (cut.target, method) in there:
                fits = options.compensate and cut.target in COMPENSATED
                compensated = trial.compensated_rise(cut, method) if fits else None
                yield Row(cut, method, trial.rise(cut, method), compensated)


def show(found: Sequence[Row], console: Console) -> None:
    for cut in dict.fromkeys(row.cut for row in found):
        rows = sorted((row for row in found if row.cut == cut), key=lambda row: row.rise.mean)
        default = next((row.rise.mean for row in rows if row.method == names_of_methods(cut.target)[0]), None)
        headings = ("method", "rise of the loss", "times the default's", "with least squares", "times the default's")
        table = Table(*headings, title=f"{cut.title} removed")
        for row in rows:
            table.add_row(row.method, *_cells(row.rise, default), *_cells(row.compensated, default))
        console.print(table)


def _cells(estimate: Estimate | None, default: float | None) -> tuple[str, str]:
    if estimate is None:
        return "", ""
    times = f"{estimate.mean / default:.2f}" if default else ""
    return f"{estimate.mean:.3f} +-{estimate.standard_error:.3f}", times


@contextmanager
def expert_model(console: Console, steps: int) -> Iterator[Path]:
    """Train a small Mixtral on the novels, and give its folder."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    source = smollm2.convert_once(smollm2.default_folder())
    config = MixtralConfig(
        vocab_size=49152,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_local_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    model = MixtralForCausalLM(config)
    texts = [samples_of(source, TEXT / name, 48, 300) for name in ("northanger_abbey.txt", "persuasion.txt")]
    samples = torch.cat(texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    model.train()
    for step in range(steps):
        part = samples[torch.randint(len(samples), (8,))]
        loss = model(input_ids=part, labels=part).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            console.print(f"training step {step}: loss {float(loss):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        model.eval().save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (Path(folder) / name).write_bytes((source / name).read_bytes())
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--only", default="", help="part of target/title of the cuts to make")
    parser.add_argument("--samples", type=int, default=32, help="samples to score")
    parser.add_argument("--held-out", type=int, default=16, help="samples to evaluate")
    parser.add_argument("--compensate", action="store_true", help="also with projections fitted by least squares")
    parser.add_argument("--experts", action="store_true", help="on a small model with experts, which is trained first")
    parser.add_argument("--training-steps", type=int, default=600)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=100)
    with tempfile.TemporaryDirectory():
        if options.experts:
            with expert_model(console, options.training_steps) as folder:
                found = run(folder, EXPERT_CUTS, options, console)
        else:
            found = run(options.model or smollm2.convert_once(smollm2.default_folder()), CUTS, options, console)
    if options.json:
        lines = [
            {
                "target": row.cut.target,
                "part": row.cut.part,
                "method": row.method,
                "rise": row.rise._asdict(),
                "compensated": None if row.compensated is None else row.compensated._asdict(),
            }
            for row in found
        ]
        options.json.write_text(json.dumps(lines, indent=1) + "\n")


def run(folder: Path, cuts: Sequence[Cut], options: argparse.Namespace, console: Console) -> list[Row]:
    scored = samples_of(folder, TEXT / "northanger_abbey.txt", 0, options.samples)
    held_out = samples_of(folder, TEXT / "persuasion.txt", 0, options.held_out)
    trial = Trial(folder, scored, held_out, num_steps=max(1, options.samples // 2))
    parent = ratio(trial.losses, torch.full_like(trial.losses, LENGTH - 1))
    console.print(f"{folder.name}: {parent.mean:.4f} +-{parent.standard_error:.4f} nats per token")
    found = []
    for row in measure(trial, cuts, options):
        found.append(row)
        both = [f"{e.mean:.4f} +-{e.standard_error:.4f}" for e in (row.rise, row.compensated) if e is not None]
        print(f"{row.cut.title}, {row.method}: {', fitted '.join(both)}", file=sys.stderr, flush=True)
    show(found, console)
    return found


if __name__ == "__main__":
    main()
