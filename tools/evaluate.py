"""How good samples are beside a reference: `python tools/evaluate.py SAMPLES --reference=REFERENCE`."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen(keep=())  # before seconds of imports
    from dit.commandline.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

from dit.commandline.argv import Tool
from dit.commandline.cli import UsageError, run
from dit.commandline.flags import options_as_flags
from dit.config import ConfigError, from_dict
from dit.configfile import overridden
from dit.evals.evaluation import Options, Order, evaluate
from dit.evals.extraction import Pass
from dit.evals.features.network import FeatureSpace
from dit.evals.features.spaces import FEATURES, FeatureSpaces
from dit.evals.making import Taken, make_reference
from dit.evals.metrics import METRICS
from dit.evals.metrics.arrays import digest, read_features
from dit.evals.metrics.measuring import choose_metrics, measure
from dit.evals.metrics.resampling import Resampling
from dit.evals.record import FILE
from dit.evals.record import history as history_lines
from dit.evals.telling import as_json, claim_features, lines, record
from dit.evals.telling import save_features as write_features
from dit.files import expand
from dit.outputs import claim_report, write_record
from dit.ranks import group
from dit.reports.comparison import Comparison
from dit.reports.page import as_text, write_page
from dit.reports.told import read_all


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
        claim_report(Path(expand(json_file)))  # before the work
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


@options_as_flags
def images(
    samples: Annotated[str, "npz of the ADM suite, a folder of tools/sample.py or of images, a tar, ..."],
    *,
    reference: Annotated[str, "the same, or a statistics file of `reference`"],
    features: Annotated[
        str, "feature networks, comma-separated, or '[{name: timm, model: ...}, ...]'"
    ] = "inception",
    options: Options,
    json_file: Annotated[str | None, "write figures, intervals and protocol here too"] = None,
    save_features: Annotated[str | None, "npz for the features, as `features` reads them"] = None,
    **features_neighbours_mind_inception_keys: str,
) -> None:
    """Print the figures of images beside a reference, each with the hash of the protocol that it holds under.

    fid, sfid and inception_score are computed with the original Inception weights alone (--features.weights=FILE); a
    distance in other features is called frechet. Images that tools/sample.py drew from a run are also recorded in
    RUN/evaluations.jsonl and its TensorBoard. docs/evaluating.md says what each figure is and how images are read.
    """
    keys = features_neighbours_mind_inception_keys
    own = {key: text for key, text in keys.items() if not re.match(r"features[._]", key)}
    spaces = read_spaces(features, {key: text for key, text in keys.items() if key not in own})
    for name, check in ((json_file, claim_report), (save_features, claim_features)):  # before the work
        if name is not None:
            check(Path(expand(name)))
    with group.session() as world:
        found = evaluate(Order(samples, reference, spaces, options, own, group.cores()), world)
        if found is None:
            return
        print("\n".join(lines(found)))
        if json_file is not None:
            write_record(made_place(json_file), as_json(found))
        if save_features is not None:
            write_features(found, made_place(save_features))
        if (run_dir := record(found)) is not None:
            print(f"recorded in {run_dir / FILE}; `evaluate.py history {run_dir}` shows all of the run")


def reference(
    images: Annotated[str, "npz, folder, tars, Parquet or digits:test"],
    out: Annotated[str, "npz file of statistics to write"],
    *,
    features: Annotated[
        str, "feature networks, comma-separated, or '[{name: timm, model: ...}, ...]'"
    ] = "inception",
    keep_features: Annotated[
        bool, "keep every image's features: for kid, precision, recall, mind, ..."
    ] = False,
    num_images: Annotated[int | None, "images that are taken, at random; none = all"] = None,
    image_size: Annotated[
        int | None, "pixels a side to crop and resize files of images to; none = as they are"
    ] = None,
    batch_size: Annotated[int, "images at a time and rank"] = 64,
    overwrite: Annotated[bool, "replace other statistics there"] = False,
    **features_keys: str,
) -> None:
    """Write a statistics file of real images: mean and covariance in each feature space, in one pass, on any ranks."""
    spaces, place = read_spaces(features, features_keys), Path(expand(out))
    if place.suffix != ".npz":
        raise UsageError(f"{out}: a statistics file is called NAME.npz")
    with group.session() as world:
        how, kept = Pass(batch_size, group.cores()), Taken(image_size, num_images, keep_features)
        is_new = make_reference(images, place, spaces, how, world, kept, overwrite)
        if world.is_main:
            print(
                f"{'wrote' if is_new else 'already there, of the same images:'} {place}; give it as --reference"
            )


def history(run_dir: Annotated[str, "of training, from which the evaluated images were drawn"]) -> None:
    """Print what was measured of a run, figures of one protocol together, and how the protocols differ."""
    print("\n".join(history_lines(Path(expand(run_dir)))))


def compare_runs(
    runs: Annotated[tuple[str, ...], "run directories, each as PATH or NAME=PATH"],
    *,
    out: Annotated[str, "HTML page to write; one of the same runs is replaced"] = "compare-runs.html",
    overwrite: Annotated[bool, "replace another page there"] = False,
) -> None:
    """Compare runs: keys that differ, where they part, curves, and which is better by what was measured alike.

    Training losses of different objectives are means of different things and say nothing of each other. What does are
    figures of drawn images by one protocol (tools/sample.py, then tools/evaluate.py), and held-out losses of one task.
    """
    comparison = Comparison(read_all(list(runs)))
    print(as_text(comparison))
    write_page(comparison, Path(expand(out)), overwrite)
    print(f"\n{out}: the same with curves against samples, FLOPs and seconds; open it in a browser")


def read_spaces(features: str, keys: Mapping[str, str]) -> tuple[FeatureSpace, ...]:
    """The feature spaces of names with commas between them, or of a list in YAML. keys: fields of one alone."""
    listed: Any = [name.strip() for name in features.split(",") if name.strip()]
    if features.lstrip().startswith(("[", "{")):
        text = features if features.lstrip().startswith("[") else f"[{features}]"
        listed = overridden(FeatureSpaces, {}, {"features": text})[0]["features"]
    if keys and len(listed) != 1:
        raise ConfigError(
            f"--{next(iter(keys))} is a field of one network; write the fields of several as a list"
        )
    if any(not isinstance(one, str | dict) for one in listed):
        raise ConfigError(
            f"--features={features}: expected names, or keys and values of networks, in the list"
        )
    fields = {re.sub(r"^features[._]", "", key): text for key, text in keys.items()}
    listed = [{**({"name": one} if isinstance(one, str) else one), **fields} for one in listed]
    return from_dict(FeatureSpaces, {"features": listed}).features


def made_place(name: str) -> Path:
    """A file's place, whose folder is there."""
    place = Path(expand(name))
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


TOOL = Tool(
    {
        "images": images,
        "features": features,
        "reference": reference,
        "history": history,
        "compare-runs": compare_runs,
    },
    keys={
        "features": [space for _, space in FEATURES.items()],
        **{name: [METRICS[name]] for name in ("neighbours", "mind", "inception")},
    },
    default="images",
)

if __name__ == "__main__":
    run(TOOL)
