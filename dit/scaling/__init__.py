"""Scaling-law experiments: a ladder of sizes and budgets as one file, its plan, its runs and its table of results."""
