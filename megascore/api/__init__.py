"""Doors for other people's programs: `attach`, `score_blockwise`, `checkpoints`, `masked_units`."""
