"""Ways in which a data set on disk goes wrong: each changes a copy of it and says which file it is."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit.data.shards.manifest import CHECKSUM, FILE, checksum

NAMES = "names.txt"
GARBAGE = [
    None,
    True,
    -1,
    0,
    1,
    7,
    10**30,
    0.5,
    -3.25,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "\ud800",
    "../x",
    [],
    [[]],
    {},
]
# What no look at the data can contradict: what images and codec were, the order of writing, words.
UNKNOWABLE = ("transform", "seed", "codec", "image_size", "classes", "posterior", "block")


@dataclass(frozen=True)
class Done:
    """files: one of which must be named. forged: a manifest that says it is right, checksum and all."""

    files: tuple[str, ...]
    what: str
    forged: bool = False


class Broken:
    """A copy of a data set, to be broken; other: another good data set of the same kind of shards."""

    def __init__(self, folder: Path, other: Path, rng: random.Random):
        self.folder, self.other, self.rng = folder, other, rng
        self.values: dict[str, Any] = json.loads((folder / FILE).read_text())
        self.shards = [s["name"] for s in self.values["shards"]]

    def any_file(self) -> str:
        return self.rng.choice([*self.shards, *self.shards, FILE, NAMES])

    def read(self, name: str) -> bytearray:
        return bytearray((self.folder / name).read_bytes())

    def write(self, name: str, data: bytes, what: str) -> Done:
        (self.folder / name).write_bytes(data)
        return Done((name,), f"{name}: {what}")

    def records(self) -> list[tuple[str, int, int]]:
        """(shard, from byte, to byte) of each block."""
        return [
            (self.shards[b["shard"]], b["offset"], b["offset"] + b["bytes"]) for b in self.values["blocks"]
        ]

    def two_alike(self) -> tuple[tuple[str, int, int], tuple[str, int, int]]:
        """Two records of one size."""
        found = self.records()
        pairs = [(a, b) for a in found for b in found if a != b and a[2] - a[1] == b[2] - b[1]]
        return self.rng.choice(pairs)

    def save(self, values: dict[str, Any], what: str, forged: bool = True) -> Done:
        """Write a manifest of these values, with the checksum that goes with them if it is forged."""
        values = {k: v for k, v in values.items() if k != CHECKSUM}
        stated = checksum(values) if forged else self.values[CHECKSUM]
        self.write(FILE, json.dumps({**values, CHECKSUM: stated}, indent=1).encode() + b"\n", what)
        return Done((FILE,), what, forged)


Corruption = Callable[[Broken], Done]
CORRUPTIONS: dict[str, Corruption] = {}


def corruption(function: Corruption) -> Corruption:
    CORRUPTIONS[function.__name__] = function
    return function


# --- bytes of any file ---------------------------------------------------------------------------------------


def flip(b: Broken, name: str) -> Done:
    data = b.read(name)
    place = b.rng.randrange(len(data))
    data[place] ^= 1 << b.rng.randrange(8)
    return b.write(name, data, f"a bit of byte {place}")


@corruption
def bit_of_a_shard(b: Broken) -> Done:
    return flip(b, b.rng.choice(b.shards))


@corruption
def bit_of_the_manifest(b: Broken) -> Done:
    return flip(b, FILE)


@corruption
def bit_of_the_names(b: Broken) -> Done:
    return flip(b, NAMES)


@corruption
def bit_of_an_array(b: Broken) -> Done:
    name, start, stop = b.rng.choice(b.records())
    data = b.read(name)
    place = b.rng.randrange(start, stop)
    data[place] ^= 1 << b.rng.randrange(8)
    return b.write(name, data, f"a bit of byte {place}, in a record")


@corruption
def truncated(b: Broken) -> Done:
    name = b.any_file()
    data = b.read(name)
    place = b.rng.randrange(len(data))
    return b.write(name, data[:place], f"cut off at byte {place}")


@corruption
def end_of_tar_cut_off(b: Broken) -> Done:
    name = b.rng.choice(b.shards)
    return b.write(name, b.read(name)[:-1], "the last byte cut off")


@corruption
def appended(b: Broken) -> Done:
    name, count = b.any_file(), b.rng.randrange(1, 3000)
    more = bytes(count) if b.rng.random() < 0.5 else b.rng.randbytes(count)
    return b.write(name, b.read(name) + more, f"{count} bytes appended")


@corruption
def emptied(b: Broken) -> Done:
    return b.write(b.any_file(), b"", "empty")


@corruption
def missing(b: Broken) -> Done:
    name = b.any_file()
    (b.folder / name).unlink()
    return Done((name,), f"{name}: missing")


@corruption
def a_folder_instead(b: Broken) -> Done:
    name = b.any_file()
    (b.folder / name).unlink()
    (b.folder / name).mkdir()
    return Done((name,), f"{name}: a folder")


@corruption
def zeroed(b: Broken) -> Done:
    name = b.any_file()
    data = b.read(name)
    start = b.rng.randrange(len(data))
    stop = min(len(data), start + b.rng.randrange(1, 2000))
    data[start:stop] = bytes(stop - start)
    return b.write(name, data, f"zeros from byte {start} to {stop}")


@corruption
def overwritten(b: Broken) -> Done:
    name = b.any_file()
    data = b.read(name)
    start = b.rng.randrange(len(data))
    noise = b.rng.randbytes(min(len(data) - start, 600))
    data[start : start + len(noise)] = noise
    return b.write(name, data, f"noise from byte {start} on")


@corruption
def bytes_gone(b: Broken) -> Done:
    name = b.any_file()
    data = b.read(name)
    start, count = b.rng.randrange(len(data)), b.rng.choice([1, 512, 1024])
    return b.write(name, data[:start] + data[start + count :], f"{count} bytes gone at byte {start}")


@corruption
def bytes_put_in(b: Broken) -> Done:
    name = b.any_file()
    data = b.read(name)
    start, count = b.rng.randrange(len(data)), b.rng.choice([1, 512, 1024])
    return b.write(name, data[:start] + bytes(count) + data[start:], f"{count} zeros put in at byte {start}")


# --- pieces in the wrong place -------------------------------------------------------------------------------


@corruption
def shards_swapped(b: Broken) -> Done:
    one, two = b.rng.sample(b.shards, 2)
    first, second = b.read(one), b.read(two)
    b.write(one, second, "")
    b.write(two, first, "")
    return Done((one, two), f"{one} and {two} swapped")


@corruption
def records_swapped(b: Broken) -> Done:
    one, two = b.two_alike()
    first, second = b.read(one[0])[one[1] : one[2]], b.read(two[0])[two[1] : two[2]]
    for (name, start, stop), data in ((one, second), (two, first)):
        whole = b.read(name)
        whole[start:stop] = data
        b.write(name, whole, "")
    return Done((one[0], two[0]), f"records {one} and {two} swapped")


@corruption
def record_twice(b: Broken) -> Done:
    one, two = b.two_alike()
    whole = b.read(two[0])
    whole[two[1] : two[2]] = b.read(one[0])[one[1] : one[2]]
    return b.write(two[0], whole, f"record {one} also in place of {two}")


@corruption
def shard_of_another_set(b: Broken) -> Done:
    other = b.rng.choice(sorted(b.other.glob("*.tar")))
    return b.write(b.rng.choice(b.shards), other.read_bytes(), "of another data set")


@corruption
def manifest_of_another_set(b: Broken) -> Done:
    shutil.copy(b.other / FILE, b.folder / FILE)
    return Done((FILE, NAMES, *b.shards), "the manifest of another data set")


@corruption
def names_of_another_set(b: Broken) -> Done:
    return b.write(NAMES, (b.other / NAMES).read_bytes(), "of another data set")


@corruption
def names_in_another_order(b: Broken) -> Done:
    lines = b.read(NAMES).decode().splitlines()
    lines[0], lines[1] = lines[1], lines[0]
    return b.write(NAMES, "".join(f"{n}\n" for n in lines).encode(), "two names swapped")


# --- what the manifest says ----------------------------------------------------------------------------------


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the numbers and words of JSON values stand."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]
    return [path]


def replaced(values: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = values.copy()
    copy[path[0]] = replaced(values[path[0]], path[1:], new)
    return copy


def said_of(values: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def edited(b: Broken, forged: bool) -> Done:
    """Any one value becomes one near it or garbage; forged: one that the data can contradict."""
    unknowable = (
        *UNKNOWABLE,
        *(("mean", "std") if b.values["eps"] else ()),
    )  # pairs: of the model that made them
    knowable = {k: v for k, v in b.values.items() if k != CHECKSUM and (not forged or k not in unknowable)}
    if forged and b.values["foreign"] and b.values["array"] == "latents":
        knowable["foreign"] = {k: v for k, v in knowable["foreign"].items() if k != "spread"}  # of moments
    while True:
        path = b.rng.choice(leaves(knowable))
        old = said_of(b.values, path)
        near = (
            [old + 1, old - 1, 2 * old] if isinstance(old, int | float) and not isinstance(old, bool) else []
        )
        near += [old[::-1], old + "0"] if isinstance(old, str) else []
        new = b.rng.choice(near if near and b.rng.random() < 0.6 else GARBAGE)
        if json.dumps(new) != json.dumps(old):
            where = ".".join(map(str, path))
            return b.save(replaced(b.values, path, new), f"{where} is {new!r}, was {old!r}", forged)


@corruption
def value_edited(b: Broken) -> Done:
    return edited(b, forged=False)


@corruption
def value_forged(b: Broken) -> Done:
    return edited(b, forged=True)


def forged(change: Callable[[Broken, dict[str, Any]], Any]) -> Corruption:
    """A change of the manifest's values, and the checksum with them."""

    def apply(b: Broken) -> Done:
        values = json.loads(json.dumps(b.values))
        change(b, values)
        return b.save(values, change.__name__)

    CORRUPTIONS[change.__name__] = apply
    return apply


@forged
def blocks_swapped(b: Broken, v: dict[str, Any]) -> None:
    one, two = b.rng.sample(range(len(v["blocks"])), 2)
    v["blocks"][one], v["blocks"][two] = v["blocks"][two], v["blocks"][one]


@forged
def block_twice(b: Broken, v: dict[str, Any]) -> None:
    block = b.rng.choice(v["blocks"])
    v["blocks"].append(block)
    v["samples"] += block["samples"]
    v["unlabelled"] += block["samples"]


@forged
def last_block_left_out(b: Broken, v: dict[str, Any]) -> None:
    block = v["blocks"].pop()
    v["samples"] -= block["samples"]
    v["unlabelled"] -= block["samples"]


@forged
def hashes_swapped(b: Broken, v: dict[str, Any]) -> None:
    one, two = b.rng.sample(v["blocks"], 2)
    one["xxh3"], two["xxh3"] = two["xxh3"], one["xxh3"]


@forged
def names_of_shards_swapped(b: Broken, v: dict[str, Any]) -> None:
    one, two = b.rng.sample(v["shards"], 2)
    one["name"], two["name"] = two["name"], one["name"]


@forged
def classes_miscounted(b: Broken, v: dict[str, Any]) -> None:
    one, two = b.rng.sample(range(len(v["classes"])), 2)
    v["class_counts"][one] += 1
    v["class_counts"][two] -= 1


@forged
def a_class_left_out(b: Broken, v: dict[str, Any]) -> None:
    v["classes"].pop()
    v["class_counts"][0] += v["class_counts"].pop()


@forged
def another_shape(b: Broken, v: dict[str, Any]) -> None:
    h = v["shape"].pop()
    v["shape"][-1] *= h
    v["shape"].append(1)


@forged
def other_statistics(b: Broken, v: dict[str, Any]) -> None:
    """With pairs these are of the model that made them; then one more sample has no label."""
    if v["eps"]:
        v["unlabelled"], v["class_counts"][0] = v["unlabelled"] + 1, v["class_counts"][0] - 1
    else:
        v[b.rng.choice(["mean", "std"])][0] += 0.125
