"""This process among others: failures and exit codes, signals, deadlines, the launcher that started it."""
