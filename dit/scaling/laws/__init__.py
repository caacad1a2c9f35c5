"""Scaling laws: L(N, D) = E + A/N^α + B/D^β fitted to a table of runs, how sure that is, and what it predicts."""
