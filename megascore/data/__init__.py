"""Calibration data: from a file in one of several formats to samples of one length, in an order of its own.

Samples and their order depend on the data, the tokenizer, the length and the seed, never on the parallel layout.
"""

from __future__ import annotations

from megascore.data.batches import (
    check_enough_samples,
    check_equal_shares,
    micro_batches_of_step,
    num_steps,
)
from megascore.data.load import check_source, load_samples
from megascore.data.samples import Samples
from megascore.data.share import MicroBatches, OwnSamples, Share, share_samples

__all__ = [
    "MicroBatches",
    "OwnSamples",
    "Samples",
    "Share",
    "check_enough_samples",
    "check_equal_shares",
    "check_source",
    "load_samples",
    "micro_batches_of_step",
    "num_steps",
    "share_samples",
]
