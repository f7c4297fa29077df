"""Plans for a smaller model: sizes and budgets, the units that stay, and the file that a person edits."""
