"""Figures of merit, each with the protocol that made it."""
