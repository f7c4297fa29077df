"""Benchmarks are programs: pytest, which looks for doctests in every module, leaves them alone."""

from __future__ import annotations

collect_ignore_glob = ["*"]
