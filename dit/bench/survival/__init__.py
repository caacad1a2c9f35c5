"""What a run survives: faults put into it on purpose."""
