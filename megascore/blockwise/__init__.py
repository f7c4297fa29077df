"""Scoring one block at a time: what feeds a block, weights that come and go, the loop over blocks."""
