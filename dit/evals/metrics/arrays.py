"""Features that others computed, from files."""

from __future__ import annotations

import hashlib
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

from dit.data import DataError
from dit.errors import Notice
from dit.evals.metrics.metric import FeatureSet
from dit.files import expand, sought

BESIDE = ("logits", "spatial")  # arrays that may stand beside them
OTHERS = ("features", "arr_0")  # names of an array of features beside the side's own


def read_features(path: str, side: str) -> FeatureSet:
    """The features (N, D) of an npz file, which it has under the name of the side, "features" or "arr_0".

    side: generated or reference; a file may hold both. Beside them may stand "logits" (N, K) and "spatial" (N, S), of
    the generated samples in a file of both. Integers are converted, which a Notice says. DataError for a file that is
    damaged or holds none, or two of which neither is the side's own.
    """
    file = Path(expand(path))
    if not file.is_file():
        raise DataError(f"{path}: there is no such file{sought(path)}; expected an npz of features")
    arrays = _arrays(file, path, [side, *OTHERS, *BESIDE])
    there = [name for name in (side, *OTHERS) if name in arrays]
    if len(there) > 1 and there[0] != side:
        raise DataError(f"{path} holds {' and '.join(there)}: call the one that is meant {side}")
    if not there:
        raise DataError(
            f"{path} holds none of {side}, {', '.join(OTHERS)}: expected an array (N, D) of such a name"
        )
    of_others = there[0] == "reference"  # in a file of both sets
    beside = {name: _floats(arrays[name], path, name) for name in BESIDE if name in arrays and not of_others}
    if "logits" in beside and _are_probabilities(beside["logits"]):
        warnings.warn(
            f"{path}: rows of logits are positive and sum to 1, as probabilities do; they are taken as logits all the "
            "same, which makes the Inception score too low: store their logarithms",
            Notice,
            stacklevel=2,
        )
    return FeatureSet(_floats(arrays[there[0]], path, there[0]), **beside, name=path)


def _arrays(file: Path, named: str, names: list[str]) -> dict[str, np.ndarray]:
    """The arrays of these names that an npz file holds."""
    with file.open("rb") as beginning:
        if beginning.read(6) == b"\x93NUMPY":
            raise DataError(
                f"{named} is a single array (.npy); expected an npz: numpy.savez(FILE, features=ARRAY)"
            )
    try:
        zipfile.ZipFile(file).close()  # np.load takes what is no archive for other formats
        with np.load(file, allow_pickle=False) as held:
            found = {name: held[name] for name in names if name in held.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{named} is no whole npz file ({error}): write or copy it again") from None
    except ValueError as error:
        objects = "object" in str(error).lower() or "pickle" in str(error).lower()
        how = (
            "holds Python objects, which are not read: store arrays of numbers"
            if objects
            else "cannot be read"
        )
        raise DataError(f"{named} {how} ({error})") from None
    for name, array in found.items():
        if not isinstance(array, np.ndarray):  # a member that is no npy file comes as its bytes
            raise DataError(
                f"{named}: {name} is no array; expected an npz: numpy.savez(FILE, features=ARRAY)"
            )
    return found


def _floats(array: np.ndarray, path: str, name: str) -> np.ndarray:
    """The array, integers as float64."""
    if array.dtype.kind not in "iu" or array.ndim != 2:
        return array
    warnings.warn(f"{path}: {name} are {array.dtype}, converted to float64", Notice, stacklevel=3)
    return array.astype(np.float64)


def _are_probabilities(logits: np.ndarray) -> bool:
    return bool(logits.ndim == 2 and (logits >= 0).all() and np.allclose(logits.sum(1), 1.0, atol=1e-3))


def digest(features: np.ndarray) -> str:
    """16 hexadecimal digits of the SHA-256 of an array's shape, type and numbers."""
    known = hashlib.sha256(f"{features.shape} {features.dtype.str}".encode())
    known.update(np.ascontiguousarray(features).data)
    return known.hexdigest()[:16]
