"""The likelihood of a data set under a trained model, with a file that says what it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit.data.shards.manifest import Manifest
from dit.evals.bits import LikelihoodOf, LikelihoodSpec
from dit.evals.protocol import protocol_hash
from dit.experiments.latents import check_same_data
from dit.experiments.trained import Precision, Trained
from dit.files import expand
from dit.outputs import claim, write_record
from dit.ranks import group
from dit.version import code_version


@dataclass(frozen=True)
class MeasuredLikelihood:
    """Figures and the file that they are in. is_new: whether they were measured now."""

    figures: Mapping[str, Any]
    file: Path
    is_new: bool

    def __str__(self) -> str:
        found, already = self.figures, "" if self.is_new else ", measured already"
        return (
            f"{found['bits_per_dim']:.4f} +- {found['standard_error']:.4f} bits/dim of normalised latents "
            f"({found['samples']} samples, protocol {found['protocol_hash']}) in {self.file}{already}"
        )


def likelihood_of(
    trained: Trained,
    data: str,
    spec: LikelihoodSpec,
    batch_size: int,
    precision: Precision,
    world: group.World,
    out: str | None = None,
    overwrite: bool = False,
) -> MeasuredLikelihood:
    """Measure it and write the figures to `out`, or find them there. Collective.

    out: a JSON file; none = RUN/likelihood/..., named by data, step, weights and protocol. Raises OutputError where
    other figures are there (overwrite: they are replaced), DataError for data unlike those of the run.
    """
    manifest = Manifest.load(data)
    check_same_data(trained.contract, manifest, str(trained.path), data)
    of = LikelihoodOf(trained.denoiser(world.device, precision), trained.norm, manifest, spec)
    record = _identity(trained, of.protocol(precision))
    file = Path(expand(out)) if out else _default_place(trained, manifest, record["protocol_hash"])
    held = group.on_main(lambda: claim([file], record, record=file, overwrite=overwrite))
    if held is not None:
        return MeasuredLikelihood(held, file, is_new=False)
    figures = of.summary(of.measure(batch_size, world)) | record
    if world.is_main:
        file.parent.mkdir(parents=True, exist_ok=True)
        where = {"checkpoint": str(trained.path), "device": world.device.type, "code": code_version()}
        write_record(file, {**figures, **where})
    return MeasuredLikelihood(figures, file, is_new=True)


def _identity(trained: Trained, protocol: dict[str, Any]) -> dict[str, Any]:
    """What decides about the figures: two files that agree in it hold the same."""
    which = {"weights": trained.weights, "step": trained.step, "digest": trained.digest}
    return {"protocol": protocol, "protocol_hash": protocol_hash(protocol), **which}


def _default_place(trained: Trained, manifest: Manifest, digest: str) -> Path:
    """Under the run directory, named by the data, the step, the weights and the protocol."""
    name = f"{Path(manifest.root).absolute().name}-step-{trained.step:08d}-{trained.weights}-{digest}.json"
    return trained.run_dir / "likelihood" / name
