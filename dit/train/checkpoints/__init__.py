"""What of a run lasts: reading, writing, keeping and exporting checkpoints."""
