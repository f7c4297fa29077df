"""What the oldest versions that pyproject.toml allows cannot do."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version

__all__ = ["needs_collectives_on_meta", "needs_parts_of_files"]

_BEFORE_2_11 = Version(torch.__version__).release < (2, 11)

needs_collectives_on_meta = pytest.mark.skipif(
    _BEFORE_2_11, reason="torch before 2.11 has no collectives on the meta device, for dry runs in one process"
)
needs_parts_of_files = pytest.mark.skipif(
    _BEFORE_2_11, reason="torch before 2.11 reads more of a file than is asked for"
)
