"""The network: its parts, its conditioners, and what it costs."""
