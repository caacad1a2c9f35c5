"""Feature networks: from images to the spaces in which sets of them are compared."""

from dit.evals.features import spaces  # all of them, in one order, whichever is imported first

__all__ = ["spaces"]
