"""Hooks by themselves, as a program of a user registers, saves and loads them. It runs in the folder of a case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

NUM_CALLS, SAVED_AFTER = 4, 2


def make_hooks(linear: nn.Linear, norm: nn.LayerNorm) -> dict[str, tuple[nn.Module, Any]]:
    """Each published hook class, with a module for it."""
    from megascore import hooks

    def settings(calibration: str | None) -> dict[str, Any]:
        return {"validation_full_iters": NUM_CALLS, "calibration_method": calibration}

    return {
        "l2": (linear, hooks.L2NormHook()),
        "independent": (linear, hooks.IndependentChannelContributionHook(linear)),
        "iterative": (linear, hooks.IterativeChannelContributionHook(linear, settings(None))),
        "calibrated": (linear, hooks.IterativeChannelContributionHook(linear, settings("scale_by_magnitude"))),
        "kv": (linear, hooks.IndependentKvHeadContributionHook.for_heads(linear, 3)),
        "norm": (norm, hooks.LayerNormContributionHook(norm, {})),
        "similarity": (norm, hooks.BlockSimilarityHook()),
    }


def hooks_alone() -> None:
    """Each class on inputs of each type, with and without a mask; saved half-way, loaded into new ones, dumped.

    ``old_states``, where it is there, holds what another checkout has saved: these hooks go on from it.
    """
    from megascore.hooks import ForwardHook

    results: dict[str, Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for masked in (False, True):
            name = f"{str(dtype).removeprefix('torch.')}{'-masked' if masked else ''}"
            torch.manual_seed(0)
            modules = nn.Linear(12, 7).to(dtype), nn.LayerNorm(12).to(dtype)
            hooks = {key: hook for key, (_, hook) in make_hooks(*modules).items()}
            calls = [((torch.randn(9, 4, 12) * 3).to(dtype), torch.rand(9, 4) < 0.7) for _ in range(NUM_CALLS)]
            for number, (x, mask) in enumerate(calls):
                if number == SAVED_AFTER:
                    # Named ``rank_0`` by the package: one folder for each kind.
                    ForwardHook.save_hook_states(hooks, Path("states") / name)
                    hooks = go_on_with(name, modules)
                for key, (module, _) in make_hooks(*modules).items():
                    y = module(x).detach()
                    hooks[key].observe(x, y, mask) if masked else hooks[key](module, (x,), y)
            ForwardHook.dump_activations_logs(hooks, Path("dumped") / name, {"made": "up"})
            for key, hook in hooks.items():
                results |= {f"{name}.{key}.{entry}": value.contiguous() for entry, value in hook.to_dict().items()}
    save_file(results, "hooks.safetensors")
    print(sorted(str(path) for path in Path("dumped").rglob("*") if path.is_file()))


def go_on_with(name: str, modules: tuple[nn.Linear, nn.LayerNorm]) -> dict[str, Any]:
    """New hooks with the states that were saved."""
    folder = Path("old_states" if Path("old_states").exists() else "states") / name
    saved = torch.load(folder / "hook_states_rank_0.pth", weights_only=True)
    hooks = {key: hook for key, (_, hook) in make_hooks(*modules).items()}
    for key, hook in hooks.items():
        hook.load_state_dict(saved[key])
    return hooks
