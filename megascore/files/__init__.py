"""Files that appear whole or not at all, the form of the package's own ones, and where they may be written."""
