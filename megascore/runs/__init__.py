"""One scoring run over somebody's forward loop, and what it has found."""
