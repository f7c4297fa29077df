"""The compute device, asked for before anything runs."""

from __future__ import annotations

import torch

from megascore.errors import ConfigError

__all__ = ["usable_device"]


def usable_device(device: torch.device | str) -> torch.device:
    """Return a device with its index, as tensors have it.

    Raises:
        ConfigError: there is no such device here.
    """
    try:
        return torch.empty(0, device=device).device
    # PyTorch asserts that it was built for the device.
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:
        told = str(error).partition("\n")[0]
        raise ConfigError(
            f"device={str(device)!r} cannot be used on this machine: {told}. Give 'cpu', or 'cuda' where there is CUDA "
            f"({torch.cuda.device_count()} such devices are visible here)."
        ) from error
