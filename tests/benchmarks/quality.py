"""What scores are worth: the rise of the loss when each says what goes, on a real model and a small one with experts.

    python -m tests.benchmarks.quality [--only ffn/25%] [--model FOLDER] [--samples 32] [--held-out 16] [--json FILE]
    python -m tests.benchmarks.quality --experts

Scores come from one pass over the shipped text with ``scores: all``, losses from another novel, by masks in the parent,
without training. Each rise has a standard error, paired by sample. The published hooks (nvidia-modelopt) are those of
``l2_norm`` and ``independent_contribution``, which give the same order; ``random`` is the floor of every target.
Without ``--model`` it is SmolLM2-135M. With ``--experts`` a model of 6 layers with 16 experts each is trained first,
for some minutes, on text of the same novels that is neither scored nor evaluated.
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
from typing import Any

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


class Trial:
    """A parent, its scores, and held-out samples on which it is compared with itself under masks."""

    def __init__(self, folder: Path, scored: Tensor, held_out: Tensor, num_steps: int) -> None:
        self.parent = Parent.of(folder)
        self.model = load(folder)
        self.held_out = held_out
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


def measure(trial: Trial, cuts: Sequence[Cut], only: str) -> Iterator[tuple[Cut, str, Estimate]]:
    targets = {key.split("/")[1] for key in trial.scores}
    there = {tuple(key.split("/")[1:]) for key in trial.scores}
    for cut in cuts:
        if cut.target not in targets or (only and only not in f"{cut.target}/{cut.title}"):
            continue
        for method in names_of_methods(cut.target):
            if (cut.target, method) in there:
                yield cut, method, trial.rise(cut, method)


def show(found: Sequence[tuple[Cut, str, Estimate]], console: Console) -> None:
    for cut in dict.fromkeys(cut for cut, _, _ in found):
        rows = sorted(((e.mean, method, e) for other, method, e in found if other == cut), key=lambda row: row[0])
        published = next((mean for mean, method, _ in rows if method == names_of_methods(cut.target)[0]), None)
        table = Table("method", "rise of the loss", "times the default's", title=f"{cut.title} removed")
        for mean, method, estimate in rows:
            times = f"{mean / published:.2f}" if published else ""
            table.add_row(method, f"{mean:.3f} +-{estimate.standard_error:.3f}", times)
        console.print(table)


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
        lines = [{"target": c.target, "part": c.part, "method": m, **e._asdict()} for c, m, e in found]
        options.json.write_text(json.dumps(lines, indent=1) + "\n")


def run(
    folder: Path, cuts: Sequence[Cut], options: argparse.Namespace, console: Console
) -> list[tuple[Cut, str, Estimate]]:
    scored = samples_of(folder, TEXT / "northanger_abbey.txt", 0, options.samples)
    held_out = samples_of(folder, TEXT / "persuasion.txt", 0, options.held_out)
    trial = Trial(folder, scored, held_out, num_steps=max(1, options.samples // 2))
    parent = ratio(trial.losses, torch.full_like(trial.losses, LENGTH - 1))
    console.print(f"{folder.name}: {parent.mean:.4f} +-{parent.standard_error:.4f} nats per token")
    found = []
    for entry in measure(trial, cuts, options.only):
        found.append(entry)
        cut, method, estimate = entry
        print(
            f"{cut.title}, {method}: {estimate.mean:.4f} +-{estimate.standard_error:.4f}", file=sys.stderr, flush=True
        )
    show(found, console)
    return found


if __name__ == "__main__":
    main()
