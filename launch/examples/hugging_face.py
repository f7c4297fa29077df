"""Scoring a Hugging Face model, killed and started again: torchrun ... launch/examples/hugging_face.py MODEL OUTPUT.

Needs no Megatron. Runs by itself too; under torchrun every process is a data-parallel replica.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import megascore
from megascore.errors import Preempted

NUM_SAMPLES, GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH, SEED = 12, 4, 32, 0


def main(checkpoint: str, output: str) -> None:
    """Score a model on made-up text."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group()
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(checkpoint).float().to(device)
    generator = torch.Generator().manual_seed(SEED)
    samples = list(torch.randint(model.config.vocab_size, (NUM_SAMPLES, SEQUENCE_LENGTH), generator=generator))
    # Batches of all ranks together, cut below: so that a step has the same samples however many ranks there are, and
    # a run that was stopped can go on with another number of them.
    loader: DataLoader[Tensor] = DataLoader(samples, batch_size=GLOBAL_BATCH_SIZE)  # type: ignore[arg-type]
    identity = {"data": f"made up, seed {SEED}", "batch": GLOBAL_BATCH_SIZE, "weights": Path(checkpoint).name}
    folder = f"{output}.checkpoints"
    with (
        megascore.attach(model, recipe="minitron") as run,
        megascore.checkpoints(run, folder, total_steps=len(loader), identity=identity) as saver,
        torch.no_grad(),
    ):
        # What was done before a restart is left out: its statistics are in the hooks already.
        for batch in islice(loader, saver.step, None):
            own = batch[rank::size].to(device)
            # use_cache=False: keys and values of tokens that are never continued would only take memory.
            if len(own):
                model(own, use_cache=False)
            run.step()
            saver.after_step()
        run.finish().save(output, overwrite=True)
        saver.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder")
    parser.add_argument("output", metavar="OUTPUT", help="score file to write; checkpoints lie beside it")
    arguments = parser.parse_args()
    try:
        main(arguments.model, arguments.output)
    except Preempted as stopped:
        # 75: what launch/score.sbatch and others take for "start me again".
        print(stopped, file=sys.stderr)
        sys.exit(75)
