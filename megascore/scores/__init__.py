"""Score files: their content, reading and writing, rankings, tables and comparisons."""
