"""How good samples are beside a reference: `python tools/evaluate.py SAMPLES --reference=REFERENCE`."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen()  # before seconds of imports
    from dit.commandline.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

from dit.commandline.argv import Tool
from dit.commandline.cli import UsageError, run
from dit.commandline.flags import options_as_flags
from dit.config import from_dict, to_dict
from dit.configfile import listed
from dit.data.codecs.codec import CODECS
from dit.evals.evaluation import evaluate
from dit.evals.extraction import Pass
from dit.evals.features.network import FeatureSpace
from dit.evals.features.spaces import FEATURES, FeatureSpaces, spaces_of
from dit.evals.making import Taken, make_reference
from dit.evals.metrics import METRICS
from dit.evals.metrics.arrays import digest, read_features
from dit.evals.metrics.measuring import choose_metrics, measure
from dit.evals.metrics.resampling import Resampling
from dit.evals.order import Options, Order
from dit.evals.record import FILE
from dit.evals.record import history as history_lines
from dit.evals.sweep.axes import Axes, read_intervals
from dit.evals.sweep.table import markdown
from dit.evals.telling import as_json, claim_features, lines, record
from dit.evals.telling import save_features as write_features
from dit.experiments.sweep_cells import SweepOrder, named_runs
from dit.experiments.sweeps import FILES as SWEEP_FILES
from dit.experiments.sweeps import sweep as run_sweep
from dit.files import expand
from dit.outputs import claim_report, write_record
from dit.ranks import group
from dit.ranks.asked import EndAsked, telling
from dit.reports.comparison import Comparison
from dit.reports.page import as_text, write_page
from dit.reports.told import read_all

Networks = Annotated[str, "feature networks, comma-separated, or '[{name: timm, model: ...}, ...]'"]


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
    early.end_if_asked()
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
    features: Networks = "inception",
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
    with _stoppable() as (world, asked):
        found = evaluate(Order(samples, reference, spaces, options, own, group.cores(), asked), world)
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
    features: Networks = "inception",
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
    with _stoppable() as (world, asked):
        how, kept = Pass(batch_size, group.cores(), asked), Taken(image_size, num_images, keep_features)
        is_new = make_reference(images, place, spaces, how, world, kept, overwrite)
        if world.is_main:
            print(
                f"{'wrote' if is_new else 'already there, of the same images:'} {place}; give it as --reference"
            )


@options_as_flags
def sweep(
    runs: Annotated[str, "run directories or checkpoints, comma-separated, each as NAME=PATH or PATH"],
    *,
    reference: Annotated[str, "real images, or a statistics file of `reference`, which saves time"],
    out: Annotated[str, "folder for sweep.csv, sweep.md, sweep.png, sweep.json and cells/"],
    features: Networks = "inception",
    metrics: Annotated[
        str, "figures or metrics, comma-separated; all = those that can be computed"
    ] = "frechet",
    axes: Axes,
    interval: Annotated[str, "of t in which there is guidance, LOW:HIGH, comma-separated"] = "0:1",
    solver: Annotated[str, "solvers, comma-separated, or '[{name: ddpm, variance: large}, ...]'"] = "heun",
    grid: Annotated[str, "which times are visited, or '{name: ..., shift: 3}'"] = "uniform",
    num_samples: Annotated[int, "images of each cell; image i is of class i modulo all"] = 1000,
    options: Options,
    splits: Annotated[int, "random splits of the held-out images and the reference, for the floor"] = 5,
    precision: Annotated[Literal["run", "fp32", "bf16"], "of matrix products; run = as in training"] = "run",
    overwrite: Annotated[bool, "replace a table there that is no sweep's"] = False,
    **features_neighbours_mind_inception_codec_keys: str,
) -> None:
    """Draw images of runs with every combination of weights, guidance, solver, steps and seed, and compare figures.

    Writes a table (best bold, differences of what is from the same noise), a CSV line for each cell and a picture
    against scale and evaluations. A finished cell is kept in OUT/cells by the hash of its protocol, and not drawn
    again: start the same command, or one with more values, to go on. Images are not kept. RUN/evaluations.jsonl gets
    a row for each cell. --held_out gives the floor: real images at the same counts, split at random.
    """
    solvers, grids = (listed(Axes, "solver", text) for text in (solver, grid))
    chosen = {"interval": read_intervals(interval), "solver": solvers, "grid": grids[0]}
    axes = from_dict(Axes, to_dict(axes) | chosen)
    options = dataclasses.replace(options, metrics=metrics, num_samples=num_samples)
    of = _by_family(features_neighbours_mind_inception_codec_keys, "features", "codec")
    spaces, place = read_spaces(features, of["features"]), Path(expand(out))
    with EndAsked().listening() as asked, group.session() as world:
        order = SweepOrder(
            named_runs(runs), reference, place, axes, spaces, options, of[""], precision, splits, of["codec"],
            group.cores(), overwrite, asked,
        )  # fmt: skip
        found = run_sweep(order, world)
        if world.is_main:
            print(markdown(found), *(f"{place / name}" for name in SWEEP_FILES), sep="\n")


@contextlib.contextmanager
def _stoppable() -> Iterator[tuple[group.World, EndAsked]]:
    """The ranks, and signals that are heard between two blocks of images: features are not kept, and cost minutes."""
    lost = "no figure is done, and nothing is kept; the same command starts anew"
    with EndAsked().listening() as asked, group.session() as world, telling(lambda: lost):
        yield world, asked


def _by_family(keys: Mapping[str, str], *families: str) -> dict[str, dict[str, str]]:
    """Keys by the family that they begin with, the others under ""."""
    found: dict[str, dict[str, str]] = {family: {} for family in ("", *families)}
    for key, text in keys.items():
        family = re.split(r"[._]", key, maxsplit=1)[0]
        found[family if family in found else ""][key] = text
    return found


def history(run_dir: Annotated[str, "of training, from which the evaluated images were drawn"]) -> None:
    """Print what was measured of a run, figures of one protocol together, and how the protocols differ."""
    early.end_if_asked()
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
    early.end_if_asked()
    comparison = Comparison(read_all(list(runs)))
    write_page(comparison, Path(expand(out)), overwrite)  # first: what is printed may be cut short by a pager
    print(as_text(comparison))
    print(f"\n{out}: the same with curves against samples, FLOPs and seconds; open it in a browser")


def read_spaces(features: str, keys: Mapping[str, str]) -> tuple[FeatureSpace, ...]:
    """The feature spaces of names with commas between them, or of a list in YAML. keys: fields of one alone."""
    return spaces_of(listed(FeatureSpaces, "features", features), keys)


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
        "sweep": sweep,
        "history": history,
        "compare-runs": compare_runs,
    },
    keys={
        "features": [space for _, space in FEATURES.items()],
        **{name: [METRICS[name]] for name in ("neighbours", "mind", "inception")},
        "codec": [codec for _, codec in CODECS.items()],
    },
    default="images",
)

if __name__ == "__main__":
    run(TOOL)
