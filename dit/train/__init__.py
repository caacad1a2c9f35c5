"""Training: engines, EMA, checkpoints, meters and the loop."""
