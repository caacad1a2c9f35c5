"""A data set read through the node's cache."""

from __future__ import annotations

from dit.config import ConfigError
from dit.data.shards.manifest import Manifest
from dit.data.shards.records import xxh3_of
from dit.data.storage.files import State, Storage, describe
from dit.data.storage.nodecache import NodeCache, NodeCacheConfig
from dit.data.storage.remote import public
from dit.files import FileError, expand

KEY = "data.cache.folder"


class CachedStorage:
    """A data set's storage with a cache before it: blocks go through it, all else goes past it.

    always: check the hash at every read of a cached block, not only where this process has not seen the file yet. What
    fails is dropped and fetched again; only what has the manifest's hash is stored.
    """

    def __init__(self, source: Storage, cache: NodeCache, manifest: Manifest, always: bool = False):
        self.source, self.cache, self.always = source, cache, always
        self._blocks = {}  # (shard's name, offset) -> (bytes, name in the cache, hash)
        for block in manifest.blocks:
            shard = manifest.shards[block.shard]
            name = f"{shard.sha256}-{block.offset}-{block.bytes}"
            self._blocks[shard.name, block.offset] = block.bytes, name, block.xxh3
        self._seen: dict[str, State] = {}  # of files whose hash was right

    def read(self, name: str, offset: int, buffers: list[memoryview]) -> State:
        size, file, xxh3 = self._blocks.get((name, offset), (0, "", ""))
        if size != sum(len(b) for b in buffers):
            return self.source.read(name, offset, buffers)  # not one block
        state = self.cache.load(file, buffers)
        if state is not None:
            if (not self.always and self._seen.get(file) == state) or xxh3_of(buffers) == xxh3:
                self._seen[file] = state
                self.cache.count(hits=1)
                return state
            self.cache.drop(file, state)
        state = self.source.read(name, offset, buffers)
        self.cache.count(misses=1, fetched=size)
        if xxh3_of(buffers) == xxh3:
            self.cache.store(file, buffers)
        return state

    def bytes(self, name: str) -> bytes:
        return self.source.bytes(name)

    def size(self, name: str) -> int:
        return self.source.size(name)


def with_cache(
    source: Storage, settings: NodeCacheConfig | None, manifest: Manifest, always: bool
) -> Storage:
    """The storage with the cache that the settings ask for, if they do. ConfigError where it could keep nothing."""
    if settings is None or settings.folder is None:
        return source
    try:
        folder = expand(settings.folder)
    except FileError as error:
        raise ConfigError(f"{KEY} = {error}") from None
    limit, most = round(settings.limit_gb * 1e9), max((b.bytes for b in manifest.blocks), default=0)
    if limit < most:
        raise ConfigError(
            f"data.cache.limit_gb = {settings.limit_gb:g} is {limit} bytes, and a block of {public(manifest.root)} has "
            f"{most}; raise it"
        )
    cache = NodeCache(folder, limit)
    try:
        cache.prepare()
    except OSError as error:
        raise ConfigError(
            f"{KEY} = {folder} cannot be used: {describe(error)}; give a folder on a disk of this node that you may "
            "write, or leave it out"
        ) from None
    return CachedStorage(source, cache, manifest, always)
