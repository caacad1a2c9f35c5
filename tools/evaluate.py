"""How good samples are beside a reference: `python tools/evaluate.py features GENERATED.npz REFERENCE.npz`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen(keep=())  # before seconds of imports
    from dit.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

from dit.cli import run
from dit.commandline import Tool
from dit.evals.metrics import METRICS
from dit.evals.metrics.arrays import digest, read_features
from dit.evals.metrics.measuring import choose_metrics, measure
from dit.evals.metrics.resampling import Resampling
from dit.files import expand
from dit.outputs import claim, write_record


def features(
    generated: Annotated[str, "npz of the samples' features (N, D), and logits (N, K) where there are any"],
    reference: Annotated[str, "npz of the reference's features (M, D)"],
    *,
    metrics: Annotated[
        str, "figures or metrics, comma-separated; all = those that the arrays suffice for"
    ] = "all",
    bootstrap: Annotated[int, "resamples for 95% intervals, 200 are usual; 0 = no intervals"] = 0,
    seed: Annotated[int, "of the resamples alone"] = 0,
    json_file: Annotated[str | None, "write figures, intervals and protocol here too"] = None,
    **neighbours_mind_inception_keys: str,
) -> None:
    """Print the figures of given features: Fréchet and kernel distances, precision, recall and more.

    Features are looked for under "generated" or "reference", "features" and "arr_0", so that one file can hold both
    sets; "logits" and "spatial" features beside them are taken too. Without logits there is no Inception score.
    docs/evaluating.md says what each figure is.

    --neighbours.references=10000 takes precision, recall, density and coverage of so many reference samples;
    --neighbours.k, --neighbours.density_k, --mind.projections, --mind.seed, --mind.scale and --inception.splits are
    other fields. All of them are part of the protocol, whose hash is printed below the figures.
    """
    if json_file is not None:
        claim([Path(expand(json_file))], overwrite=True)  # before the work
    ours, theirs = read_features(generated, "generated"), read_features(reference, "reference")
    chosen, missing = choose_metrics(metrics, neighbours_mind_inception_keys, ours, theirs)
    identity = {"features": "given", "reference": digest(theirs.features)}
    found = measure(chosen, ours, theirs, Resampling(bootstrap, seed), identity)
    found = dataclasses.replace(found, missing=missing)
    print(found.table())
    dimensions = found.protocol["dimensions"]
    print(
        f"{len(ours)} samples, {len(theirs)} of the reference, {dimensions} dimensions; protocol {found.hash}"
    )
    if json_file is not None:
        place = Path(expand(json_file))
        place.parent.mkdir(parents=True, exist_ok=True)
        write_record(place, found.as_json())


TOOL = Tool(
    {"features": features},
    keys={name: [METRICS[name]] for name in ("neighbours", "mind", "inception")},
)

if __name__ == "__main__":
    run(TOOL)
