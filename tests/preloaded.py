"""What the server of tests/forks.py runs when it begins, so that no process forked from it need do so."""

from __future__ import annotations

import gc
import importlib

from tests.forks import PRELOADED

for name in PRELOADED:
    importlib.import_module(name)
# What is imported stays for good. A process whose collector visited all of it once would copy 200 MB of the server's
# memory, which takes half a second: longer than most of what tests have a process do.
gc.collect()
gc.freeze()
