"""Imports Megatron once, outside of any test: what its modules warn of on import would be errors inside."""

from __future__ import annotations

import megascore.job.job  # noqa: F401
