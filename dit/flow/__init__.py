"""The mathematics of the objective: paths, predictions, times, weights and couplings.

Everything here sees the network only as a callable `model(x, model_time, cond)`.
"""
