"""The mathematics of the objective: paths, predictions, times, weights, couplings and auxiliary terms.

Everything here sees the network only as a callable `model(x, model_time, cond)`.
"""

from dit.flow import batchwise as batchwise  # so that AUXILIARIES holds the terms of several samples too
from dit.flow import discrete as discrete  # so that PATHS holds the discrete paths too
from dit.flow import guided as guided
from dit.flow import variance as variance  # so that AUXILIARIES holds the term of a learned variance too
