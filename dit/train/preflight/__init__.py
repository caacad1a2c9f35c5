"""What is looked at before a run starts, on every node."""
