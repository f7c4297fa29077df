"""Two checkouts of the package on the same jobs: ``python -m tests.benchmarks.two_checkouts OLD [NEW]``."""
