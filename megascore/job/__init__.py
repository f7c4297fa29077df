"""A torchrun job: config to score file, in a full pass or layer by layer, and its dry run."""
