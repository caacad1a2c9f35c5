"""What the names of class folders mean, on a disk or in a tar, and of class tars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dit.data import DataError
from dit.data.sources.classes import Classes, LabelColumn, LabelType, in_order


class FolderClasses(NamedTuple):
    """labels: of each class folder, (n,) int64. before: the order of the classes in versions before, if another."""

    labels: np.ndarray
    classes: Classes
    before: Classes | None = None

    def fields(self) -> dict[str, Any]:
        """Those of an ImageSource."""
        return {"classes": self.classes, "classes_before": self.before}


def of_folders(folders: Sequence[str], kind: LabelType, where: str) -> FolderClasses:
    """What the names of class folders mean: they are names of classes, unless `kind` is number.

    DataError, with `where`, for folders that are no numbers then, or stand for the same one.
    """
    if kind != "number":
        classes, before = in_order(folders), tuple(sorted(folders))
        place = {name: i for i, name in enumerate(classes)}
        labels = np.array([place[name] for name in folders], np.int64)
        return FolderClasses(labels, classes, None if before == classes else before)
    column = LabelColumn("number")
    for name in folders:
        column.add(name)
    labels, classes = column.numbered(where, lambda i: f"class folder '{folders[i]}'")
    twice = np.flatnonzero(np.bincount(labels[labels >= 0]) > 1).tolist()
    if twice:
        both = [name for name, label in zip(folders, labels.tolist(), strict=True) if label == twice[0]]
        raise DataError(f"{where}: the folders {', '.join(both)} stand for the same number; rename one")
    return FolderClasses(labels, classes)
