"""Units of a table's columns: samples among tokens, millions and petaFLOPs are named, with the lines that have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dit.scaling.laws.law import LawError

NAMED = 5  # rows of one fault that a message names; of more it says how many
USUAL = (
    6.0  # FLOPs of training by parameter and token, where nothing but their product costs (arXiv 2001.08361)
)
RATIO = (0.05, 100.0)  # that FLOPs by parameter and token lie in, in mean
SCATTER = 8.0  # by which a run's may be off the median
AN_IMAGE = (1.0, 1e6)  # tokens of a sample; 1e6 are an image of 1000 x 1000 patches
UNLIKE = 100.0  # by which a run's may be off the median: patches of 8 to 1 differ by 64, units by 1000
EACH = (1e-6, 1e9)  # that tokens by parameter lie in, where they are derived from flops


def at_lines(lines: Sequence[int]) -> str:
    """Lines in a message: "line 3", "lines 3, 7 and 9"."""
    shown = [str(line) for line in lines[:NAMED]]
    if len(lines) > NAMED:
        return f"lines {', '.join(shown)} and {len(lines) - NAMED} more"
    return f"line {shown[0]}" if len(shown) == 1 else f"lines {', '.join(shown[:-1])} and {shown[-1]}"


def refuse_mixed(columns: Mapping[str, np.ndarray], lines: Sequence[int], named: str) -> None:
    """LawError where tokens are samples in some rows or all, or a column is in another unit.

    columns: params and flops, (n,) each, and tokens and samples where there are such. lines: of the file, (n,).
    """
    params, flops, has_tokens = columns["params"], columns["flops"], "tokens" in columns
    tokens = columns["tokens"] if has_tokens else flops / (USUAL * params)
    told = "tokens" if has_tokens else f"flops / ({USUAL:g} · params)"
    each = tokens / params
    is_odd = ((each < EACH[0]) | (each > EACH[1])) & (not has_tokens)
    for off, what in (
        (tokens < 1, f"{told} is below one token"),
        (params < 1, "params is below 1"),
        (is_odd, f"{told} is {each[is_odd][0] if is_odd.any() else 0:.4g} tokens a parameter"),
    ):
        if off.any():
            raise LawError(
                f"{named}: {at_lines(list(np.array(lines)[off]))}: {what}: expected are flops in FLOPs, and params and "
                "tokens in numbers, not in thousands or millions"
            )
    if has_tokens:
        _refuse_samples(columns, lines, named)


def _refuse_samples(columns: Mapping[str, np.ndarray], lines: Sequence[int], named: str) -> None:
    tokens = columns["tokens"]
    if "samples" in columns:
        same = np.isclose(tokens, columns["samples"], rtol=1e-9)
        if same.any() and not same.all():
            raise LawError(
                f"{named}: {at_lines(list(np.array(lines)[same]))}: tokens are the samples, and elsewhere they "
                "are not: write tokens (samples · tokens an image) in every row"
            )
        _refuse_odd_samples(tokens / columns["samples"], lines, named)
    each = columns["flops"] / columns["params"] / tokens
    middle = float(np.median(each))
    off = (each > SCATTER * middle) | (each < middle / SCATTER)
    if off.any():
        raise LawError(
            f"{named}: {at_lines(list(np.array(lines)[off]))}: flops / (params · tokens) is {each[off][0]:.4g}, "
            f"and {middle:.4g} in the middle of all runs: samples among tokens? Write tokens "
            "(samples · tokens an image) in every row"
        )
    if not RATIO[0] <= middle <= RATIO[1]:
        raise LawError(
            f"{named}: flops / (params · tokens) is {middle:.4g}, where about 6 is usual: "
            + ("tokens look like samples (multiply them by the tokens of an image), or params are in millions"
               if middle > RATIO[1] else
               "flops, params or tokens are in another unit; plain numbers are expected")
        )  # fmt: skip


def _refuse_odd_samples(an_image: np.ndarray, lines: Sequence[int], named: str) -> None:
    """LawError where samples are in another unit than tokens. an_image (n,): tokens over samples."""
    middle = float(np.median(an_image))
    off = (an_image > UNLIKE * middle) | (an_image < middle / UNLIKE)
    mend = "samples are images seen, in plain numbers, and tokens are samples · tokens an image"
    if off.any():
        raise LawError(
            f"{named}: {at_lines(list(np.array(lines)[off]))}: tokens / samples is {an_image[off][0]:.4g}, and "
            f"{middle:.4g} in the middle of all runs: {mend}"
        )
    if not AN_IMAGE[0] * (1 - 1e-6) <= middle <= AN_IMAGE[1]:
        raise LawError(f"{named}: tokens / samples is {middle:.4g}, which are no tokens of an image: {mend}")
