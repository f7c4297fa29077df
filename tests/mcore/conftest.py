"""Imports Megatron once, outside of any test: what it imports warns, which would be errors inside."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megascore.mcore.build
    import megascore.mcore.schedule  # noqa: F401
