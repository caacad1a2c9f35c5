"""Labels in a column of Arrow's, of whatever type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dit.data.sources.classes import LabelColumn

if TYPE_CHECKING:
    import pyarrow as pa


def may_hold_labels(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold numbers or names of classes."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = (types.is_integer, types.is_floating, types.is_boolean, types.is_string, types.is_large_string)
    return any(test(kind) for test in (*tests, types.is_null))


def take_labels(column: pa.ChunkedArray, labels: LabelColumn) -> None:
    """Add a column's values, each different one once, to the labels. Null is none, and NaN, as pandas has it."""
    for chunk in column.chunks:
        coded = chunk if hasattr(chunk, "dictionary") else chunk.dictionary_encode()
        values = coded.dictionary.to_pylist()
        known = np.array([value is not None and value == value for value in values], bool)
        places = np.append(
            np.where(known, np.cumsum(known) - 1, -1), -1
        )  # of each value among the known ones
        codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        labels.extend([v for v, k in zip(values, known.tolist(), strict=True) if k], places[codes])
