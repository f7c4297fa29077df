"""One scoring run: config, data, sites, loop, score file and reports. Imports no model library."""
