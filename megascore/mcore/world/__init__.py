"""The parallel world of a run: process groups, devices, and worlds that one process pretends."""
