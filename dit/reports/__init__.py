"""What several runs say together: their differences, their curves, and which of them is better at what."""
