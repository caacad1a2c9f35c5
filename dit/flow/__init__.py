"""The mathematics of the objective: paths, predictions, times, weights and couplings.

Everything here sees the network only as a callable `model(x, model_time, cond)`.
"""

from dit.flow import discrete as discrete  # so that PATHS holds the discrete paths too
