"""Block-input capture: storing what goes into a block, and running blocks alone. Needs PyTorch alone."""
