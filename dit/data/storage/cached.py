"""A data set read through the node's cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import xxhash

from dit.config import ConfigError
from dit.data.storage.files import State, Storage, describe
from dit.data.storage.nodecache import NodeCache, NodeCacheConfig
from dit.data.storage.remote import public
from dit.files import FileError, expand

KEY = "data.cache.folder"


class CachedBlock(NamedTuple):
    """A block as the cache knows it: its name there, its bytes, and their XXH3 hash in hexadecimal digits."""

    file: str
    bytes: int
    xxh3: str


BlockTable = Mapping[tuple[str, int], CachedBlock]  # by the shard's name and the block's offset in it


class CachedStorage:
    """A data set's storage with a cache before it: blocks go through it, all else goes past it.

    always: check the hash at every read of a cached block, not only where this process has not seen the file yet. What
    fails is dropped and fetched again; only what has the table's hash is stored.
    """

    def __init__(self, source: Storage, cache: NodeCache, blocks: BlockTable, always: bool = False):
        self.source, self.cache, self.blocks, self.always = source, cache, blocks, always
        self._seen: dict[str, State] = {}  # of files whose hash was right

    def read(self, name: str, offset: int, buffer: memoryview) -> State:
        block = self.blocks.get((name, offset))
        if block is None or block.bytes != len(buffer):
            return self.source.read(name, offset, buffer)  # not one block
        state = self.cache.load(block.file, buffer)
        if state is not None:
            known = not self.always and self._seen.get(block.file) == state
            if known or xxhash.xxh3_64_hexdigest(buffer) == block.xxh3:
                self._seen[block.file] = state
                self.cache.count(hits=1)
                return state
            self.cache.drop(block.file, state)
        state = self.source.read(name, offset, buffer)
        self.cache.count(misses=1, fetched=block.bytes)
        if xxhash.xxh3_64_hexdigest(buffer) == block.xxh3:
            self.cache.store(block.file, buffer)
        return state

    def bytes(self, name: str) -> bytes:
        return self.source.bytes(name)

    def size(self, name: str) -> int:
        return self.source.size(name)


def with_cache(
    source: Storage, settings: NodeCacheConfig | None, blocks: BlockTable, root: str, always: bool
) -> Storage:
    """Put the cache that the settings ask for before a storage, if they do.

    root: the data set's, for messages. Raises ConfigError where the cache could keep nothing.
    """
    if settings is None or settings.folder is None:
        return source
    try:
        folder = expand(settings.folder)
    except FileError as error:
        raise ConfigError(f"{KEY} = {error}") from None
    limit, most = round(settings.limit_gb * 1e9), max((b.bytes for b in blocks.values()), default=0)
    if limit < most:
        raise ConfigError(
            f"data.cache.limit_gb = {settings.limit_gb:g} is {limit} bytes, and a block of {public(root)} has {most}; "
            "raise it"
        )
    cache = NodeCache(folder, limit)
    try:
        cache.prepare()
    except OSError as error:
        raise ConfigError(
            f"{KEY} = {folder} cannot be used: {describe(error)}; give a folder on a disk of this node that you may "
            "write, or leave it out"
        ) from None
    return CachedStorage(source, cache, blocks, always)
