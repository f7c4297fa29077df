"""Stores in which captured tensors wait: on their device, in the host's memory, or in files of a spool folder."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from megascore.capture.spool_folder import SpoolFolder
from megascore.errors import ConfigError, DataError
from megascore.files.whole import write_whole

__all__ = ["DeviceStore", "HostStore", "SpoolStore", "TensorStore"]


class TensorStore(ABC):
    """Tensors by name. What is put in is detached and copied, and is no inference tensor when it comes out."""

    @abstractmethod
    def put(self, key: str, tensor: Tensor) -> None:
        """Keep a copy of a tensor; one that is there under this name is replaced, or stays if this fails."""

    @abstractmethod
    def get(self, key: str, device: torch.device | str, *, copy: bool = False) -> Tensor:
        """Return a tensor on ``device``; ``copy`` for one that may be written into."""

    @abstractmethod
    def drop(self, key: str) -> None:
        """Forget a tensor; nothing happens if there is none of this name."""

    @abstractmethod
    def __contains__(self, key: object) -> bool:
        """Tell whether there is a tensor of this name."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory that the tensors take, without those in files."""

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give back what is not freed by itself. Can be repeated."""


class DeviceStore(TensorStore):
    """Keeps tensors on the device where they are: the fastest, and the largest."""

    def __init__(self) -> None:
        """Start empty."""
        self._tensors: dict[str, Tensor] = {}
        self._num_bytes = 0

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep a copy on the tensor's own device."""
        copied = self._copied(tensor)
        self.drop(key)
        self._tensors[key] = copied
        self._num_bytes += copied.nbytes

    def get(self, key: str, device: torch.device | str, *, copy: bool = False) -> Tensor:
        """Return the tensor itself where it is on ``device`` and need not be a copy."""
        kept = self._tensors[key]
        moved = kept.to(device, non_blocking=kept.is_pinned() if kept.device.type == "cpu" else False)
        return moved.clone() if copy and moved is kept else moved

    def drop(self, key: str) -> None:
        """Free the memory."""
        if key in self._tensors:
            self._num_bytes -= self._tensors.pop(key).nbytes

    def __contains__(self, key: object) -> bool:
        """Tell whether there is a tensor of this name."""
        return key in self._tensors

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take."""
        return self._num_bytes

    def _copied(self, tensor: Tensor) -> Tensor:
        # A copy made outside of inference mode is a normal tensor, which any later mode can use.
        with torch.inference_mode(False), torch.no_grad():
            return tensor.detach().clone()


class HostStore(DeviceStore):
    """Keeps tensors in the host's memory; in page-locked memory if they come from a CUDA device."""

    def _copied(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            return super()._copied(tensor)
        with torch.inference_mode(False), torch.no_grad():
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            return host.copy_(tensor.detach())


@dataclass(frozen=True)
class _File:
    path: Path
    checksum: int
    complex: bool


class SpoolStore(TensorStore):
    """Keeps tensors in the host's memory up to a budget, and the others in files, one safetensors file for each.

    The files lie in a folder of their own inside the one that was given, and are gone after `close`, or with the store
    itself. Those of a process that was killed are removed by the next store in the same place (see `SpoolFolder`). A
    file appears whole or not at all, and is checked when it is read.
    """

    def __init__(self, folder: str | Path, memory_bytes: int = 0) -> None:
        """Make the folder.

        Args:
            folder: On a disk with room for what does not fit into memory; made if missing.
            memory_bytes: How many bytes of tensors stay in memory: those that come first.

        Raises:
            ConfigError: a negative budget.
            DataError: the folder cannot be made.
        """
        if memory_bytes < 0:
            raise ConfigError(f"SpoolStore was given memory_bytes={memory_bytes}: expected 0 or more.")
        self._memory_bytes = memory_bytes
        self._memory = HostStore()
        self._files: dict[str, _File] = {}
        try:
            self._folder = SpoolFolder(Path(folder))
        except OSError as error:
            raise DataError(f"spool folder {folder} cannot be used: {error}. Name one that can be written.") from error

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep a copy, in memory while the budget lasts.

        Raises:
            DataError: the file cannot be written: the disk is full, say. What was there under this name stays.
        """
        here = self._memory.num_bytes - (self._memory.get(key, "cpu").nbytes if key in self._memory else 0)
        if here + tensor.nbytes <= self._memory_bytes:
            self._memory.put(key, tensor)
            self._remove_file(key)
            return
        path = self._folder.path / f"{key}.safetensors"
        is_complex = tensor.is_complex()
        content = bytes_of({"tensor": _storable(tensor)})
        try:
            # Not synced: nobody reads the file after this process has ended.
            write_whole(path, content, sync=False)
        except OSError as error:
            raise DataError(
                f"spool folder {self._folder.path.parent} took {len(self._files)} tensors, but not one more of "
                f"{len(content)} bytes: {error}. Make room, name another folder, or raise memory_bytes "
                f"(now {self._memory_bytes})."
            ) from error
        self._files[key] = _File(path, zlib.crc32(content), is_complex)
        self._memory.drop(key)

    def get(self, key: str, device: torch.device | str, *, copy: bool = False) -> Tensor:
        """Return a tensor, from memory or from its file.

        Raises:
            DataError: the file is gone, or not as it was written.
        """
        if key in self._memory:
            return self._memory.get(key, device, copy=copy)
        file = self._files[key]
        try:
            content = file.path.read_bytes()
            if zlib.crc32(content) != file.checksum:
                raise DataError(f"spooled file {file.path} is not as it was written: its checksum differs. {_ADVICE}")
            tensor = tensors_of(content)["tensor"]
        except (OSError, SafetensorError) as error:
            raise DataError(f"spooled file {file.path} cannot be read: {error}. {_ADVICE}") from error
        return (torch.view_as_complex(tensor) if file.complex else tensor).to(device)

    def drop(self, key: str) -> None:
        """Free the memory, or remove the file."""
        self._memory.drop(key)
        self._remove_file(key)

    def __contains__(self, key: object) -> bool:
        """Tell whether there is a tensor of this name."""
        return key in self._memory or key in self._files

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take, without those in files."""
        return self._memory.num_bytes

    def close(self) -> None:
        """Remove the files and their folder, not the folder that was given."""
        self._files.clear()
        self._folder.close()

    def _remove_file(self, key: str) -> None:
        file = self._files.pop(key, None)
        if file is not None:
            with suppress(OSError):
                file.path.unlink(missing_ok=True)


_ADVICE = "Keep others out of the folder, or take another disk, and start again."


def _storable(tensor: Tensor) -> Tensor:
    # Complex rotary tables are known to few versions of the format.
    plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return plain.detach().cpu().contiguous()
