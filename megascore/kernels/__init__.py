"""The numerics of hooks: sums, products, and the memory they use again. No score is defined here."""
