"""What somebody types, from argv to the call of a command: help, checks before torch is loaded, and the wrapper."""
