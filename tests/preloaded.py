"""What the server of tests/forks.py imports once, so that no process forked from it does."""

from __future__ import annotations

import atexit
import gc
import importlib

MODULES = (
    "dit.experiments.diffusion",
    "dit.experiments.autoencoder",
    "dit.train.engines.zero_engine",
    "deepspeed.module_inject",  # imported by its first initialize(), as are the two below
    "networkx",
    "torch._inductor.compile_fx",
    "sklearn.datasets",
    "pytest",  # by every test's file
    "tests.datasets",
    "tests.train.on_ranks",
    "tests.train.short_runs",
)
for name in MODULES:
    importlib.import_module(name)
# What is imported stays for good. A process whose collector visited all of it once would copy 200 MB of the server's
# memory, which takes half a second: longer than most of what tests have a process do.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
