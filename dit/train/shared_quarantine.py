"""Broken blocks over all ranks: what is known of them, and what all of them leave out."""

from __future__ import annotations

from collections.abc import Callable

from dit.data.loading.quarantine import Quarantine
from dit.errors import UserError
from dit.ranks import group

Blocks = dict[tuple[int, int], str]  # (data set, block) -> why it cannot be read


class QuarantineError(UserError):
    """More blocks are broken than data.max_quarantined allows."""


class SharedQuarantine:
    """Unites a rank's quarantine with its peers'. Every method is collective.

    say: prints on rank 0.
    """

    def __init__(self, quarantine: Quarantine, say: Callable[[str], object]):
        self.quarantine, self.say = quarantine, say
        self._reported: set[tuple[int, int]] = set()
        self._agreed: set[tuple[int, int]] = set()

    def known(self) -> Blocks:
        """Give the blocks that any rank could not read. QuarantineError, on all ranks, where there are too many."""
        known: Blocks = {}
        for reasons in group.gather_objects(self.quarantine.reasons):
            known |= reasons
        for block in sorted(known.keys() - self._reported):
            self.say(f"quarantined, its samples are left out: {known[block]}")
        self._reported |= known.keys()
        if len(known) > self.quarantine.budget:
            raise QuarantineError(
                f"{len(known)} blocks cannot be read, data.max_quarantined = {self.quarantine.budget}:\n  "
                + "\n  ".join(list(known.values())[:10])
            )
        return known

    def load(self, entries: list[tuple[int, int, str]]) -> None:
        """Leave out what a checkpoint says (`agree`) from now on, whatever the files hold."""
        loaded = {(data_set, block): why for data_set, block, why in entries}
        self.quarantine.load(loaded)
        self.known()
        # what else a rank knows, of the time before a run went back, is news to the others
        self._agreed = set(loaded)

    def agree(self, stop_reading: Callable[[], object]) -> list[tuple[int, int, str]]:
        """Agree on what every rank leaves out from here on, so that going on is the same as resuming; give it, for a
        checkpoint.

        stop_reading: forgets batches that were read ahead, called where there is something new: they may hold samples
        of a block that another rank, or a later read, found broken.
        """
        if self.known().keys() != self._agreed:
            stop_reading()
            known = self.known()  # the reading thread may have found more until it ended
            self.quarantine.load(known)
            self._agreed = set(known)
        return [(*block, why) for block, why in sorted(self.quarantine.reasons.items())]
