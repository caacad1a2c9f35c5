"""Where the time of a training step goes: a trace of it, and its parts."""
