"""``python -m megascore``, which is what torchrun starts."""

from __future__ import annotations

import sys

from megascore.cli import main

if __name__ == "__main__":
    sys.exit(main())
