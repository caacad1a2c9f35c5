"""Why there is no data set where somebody expects one, and what to do: words for errors."""

from __future__ import annotations

import os

from dit.data.storage.remote import is_remote, public

PARTIAL = ".partial"  # what follows the name of a data set whose encode has not finished


def absent(root: str, file: str) -> str:
    """Explain a folder or URL without this file, its manifest."""
    shown = public(root)
    if os.path.isfile(root) or root.endswith(".tar"):
        return f"{shown}: is a file of a data set; give the folder: {public(os.path.dirname(root)) or '.'}"
    for partial in (root, root + PARTIAL):
        if partial.endswith(PARTIAL) and os.path.isdir(partial):
            return f"{shown}: its encode is unfinished ({partial}): start the same encode command again"
    there = "not a data set" if is_remote(root) or os.path.isdir(root) else "no such folder"
    return f"{shown}: no {file} ({there}); make data sets with tools/encode.py, or tools/shards.py index for tars"
