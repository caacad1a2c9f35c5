"""The reader of a data set, by its format."""

from __future__ import annotations

from typing import Any

from dit.data.foreign.reader import SampleReader
from dit.data.shards.blocks import BlockReader
from dit.data.shards.manifest import Manifest

READERS: dict[str, type[BlockReader]] = {"dit-blocks/2": BlockReader, "dit-samples/1": SampleReader}


def open_reader(manifest: Manifest, *args: Any, **kwargs: Any) -> BlockReader:
    """Open a reader of this data set's blocks; the arguments of BlockReader."""
    return READERS[manifest.format](manifest, *args, **kwargs)
