"""The files of the published interface: hook states and results of each rank, arguments, and the ranking over norms.

Every file appears whole or not at all.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megascore.files.whole import write_whole

__all__ = ["dump_channel_importance", "dump_results", "save_hook_states"]


class _Hook(Protocol):
    """The part of a hook that is written."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on."""

    def to_dict(self) -> dict[str, Tensor]:
        """Return all results."""


def save_hook_states(hooks: Mapping[str, _Hook], folder: Path) -> None:
    """Write ``hook_states_rank_{rank}.pth``: each hook's `state_dict` by name. Not collective by itself."""
    states = {name: hook.state_dict() for name, hook in hooks.items()}
    _write_tensors(folder / f"hook_states_rank_{_rank()}.pth", states)


def dump_results(hooks: Mapping[str, _Hook], folder: Path, args: Any) -> None:
    """Write ``rank_{rank}.pth`` (each hook's `to_dict` by name), and on rank 0 ``args.json``.

    Collective over the world where torch.distributed is initialised.
    """
    results = {name: hook.to_dict() for name, hook in hooks.items()}
    _write_tensors(folder / f"rank_{_rank()}.pth", results)
    if _rank() == 0:
        _write_json(folder / "args.json", _plain(args))
    _barrier()


def dump_channel_importance(hooks: Mapping[str, _Hook], folder: Path, args: Any) -> None:
    """Write ``channel_importance_results.json`` on rank 0: features ranked by their mean score over all norms.

    Reads the ``rank_{rank}.pth`` of this world's ranks, which must be there. Collective over the world where
    torch.distributed is initialised.
    """
    if _rank() == 0:
        scores = [
            results["score"].double()
            for rank in range(_world_size())
            for results in torch.load(folder / f"rank_{rank}.pth", map_location="cpu", weights_only=True).values()
            if "score" in results
        ]
        if scores:
            report = _importance_report(torch.stack(scores).mean(0), args)
            _write_json(folder / "channel_importance_results.json", report)
    _barrier()


def _importance_report(scores: Tensor, args: Any) -> dict[str, Any]:
    now = datetime.now(timezone.utc).astimezone().strftime("%Y_%m_%d__%H_%M_%S")
    ranking = torch.argsort(scores, descending=True, stable=True)
    plain = _plain(args)
    known = plain if isinstance(plain, dict) else {}
    return {
        "model_path": known.get("model_name_or_path", "unknown"),
        "dataset_path": known.get("dataset_path", "unknown"),
        "experiment_id": known.get("experiment_id", f"experiment_{now}"),
        "eval_samples": known.get("eval_samples", 0),
        "micro_batch_size": known.get("micro_batch_size", 0),
        "timestamp": now,
        "total_channels": len(ranking),
        "channel_importance_ranking": ranking.tolist(),
        "channel_scores": scores.tolist(),
        "score_statistics": {
            "min": float(scores.min()),
            "max": float(scores.max()),
            "mean": float(scores.mean()),
            "std": float(scores.std()) if len(scores) > 1 else 0.0,
        },
    }


def _plain(args: Any) -> Any:
    """Return ``args`` as what JSON can hold; ``args`` stays as it is.

    Takes an OmegaConf container, a mapping or a namespace. The live model among ``activation_hooks_kwargs`` is left
    out, other objects become their text.
    """
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and omegaconf.OmegaConf.is_config(args):
        # A config can hold live objects only behind flags that to_container keeps.
        args = omegaconf.OmegaConf.to_container(args, resolve=True)
    elif not isinstance(args, Mapping):
        args = vars(args) if hasattr(args, "__dict__") else args
    if isinstance(args, Mapping) and isinstance(args.get("activation_hooks_kwargs"), Mapping):
        kept = {key: value for key, value in args["activation_hooks_kwargs"].items() if key != "model"}
        args = {**args, "activation_hooks_kwargs": kept}
    return json.loads(json.dumps(args, default=str))


def _write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=2).encode())


def _write_tensors(path: Path, content: Any) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _is_distributed() else 0


def _world_size() -> int:
    return dist.get_world_size() if _is_distributed() else 1


def _barrier() -> None:
    if not _is_distributed():
        return
    if "nccl" in str(dist.get_backend()):
        # NCCL would take the device of this rank's number, which several ranks may then share, or none have.
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()
