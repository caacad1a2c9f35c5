"""What the server of tests/forks.py runs when it begins, so that no process forked from it need do so."""

from __future__ import annotations

import gc
import importlib

from tests.forks import PRELOADED

for name in PRELOADED:
    importlib.import_module(name)

import deepspeed  # noqa: E402 (it is quiet if dit.train.engines.zero_engine imports it first)
import torch  # noqa: E402

from dit.train.plan import device_peak  # noqa: E402

# What every training process finds out about this machine, and caches: what gcc compiles, and the peak of matrix
# products.
assert deepspeed.ops.__compatible_ops__
device_peak(torch.device("cpu"))
# What is imported stays for good. A process whose collector visited all of it once would copy 200 MB of the server's
# memory, which takes half a second: longer than most of what tests have a process do.
gc.collect()
gc.freeze()
