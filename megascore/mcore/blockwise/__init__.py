"""Jobs that run one layer at a time over all samples, in any parallel layout."""
