"""What the units that stay take over for those that went: output projections fitted again on calibration data."""
