"""What the commands share: the console, and jobs that need Megatron."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console

from megascore.errors import MegascoreError
from megascore.process.launcher import ending_with_launcher

__all__ = ["console_on", "job_of_ranks"]

_EXTRA_OF_PACKAGE = {"megatron": "megatron", "transformers": "huggingface", "tokenizers": "huggingface"}


def console_on(stream: TextIO) -> Console:
    """Return a console on a stream, which is 100 columns wide where it is no terminal."""
    # A stream that can't show a character, such as a log in the C locale, gets a '?' instead of a crash at the end.
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    width = None if stream.isatty() or "COLUMNS" in os.environ else 100
    return Console(file=stream, width=width)


@contextmanager
def job_of_ranks(command: str) -> Iterator[None]:
    """Run what ranks do together: a missing package is told with the extra that brings it.

    Raises:
        MegascoreError: a package is not installed.
    """
    try:
        with ending_with_launcher():
            yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_OF_PACKAGE:
            raise
        extra = _EXTRA_OF_PACKAGE[package]
        raise MegascoreError(
            f"'megascore {command}' needs the package '{error.name}', which isn't installed: "
            f"pip install 'megascore[{extra}]'"
        ) from error
