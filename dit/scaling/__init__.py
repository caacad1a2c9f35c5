"""Scaling experiments: ladders of runs, and the laws that are fitted to them."""
