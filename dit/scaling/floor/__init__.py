"""The irreducible loss: computed where the data's distribution is known, and ladders on such data."""
