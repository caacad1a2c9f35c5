"""Scaling-law experiments: planned, run, collected, fitted and reported."""
