"""How the ranks of a job meet, act together, and notice one that is lost."""
