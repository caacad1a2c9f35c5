"""The likelihood of a data set under a trained model, with a file that says what it is of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit.config import ConfigError
from dit.data.shards.manifest import Manifest
from dit.evals.bits import LikelihoodOf, LikelihoodSpec
from dit.evals.protocol import protocol_hash
from dit.experiments.latents import check_same_data
from dit.experiments.trained import Precision, Trained
from dit.files import expand
from dit.outputs import claim, differences, write_record
from dit.ranks import group
from dit.ranks.asked import EndAsked
from dit.sample.likelihood import bits_per_dim
from dit.unfinished import unfinished
from dit.version import code_version

NATS = "nats_of_samples"  # in a record: of every sample, in the data's order


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
    each: bool = False,
    asked: EndAsked | None = None,
) -> MeasuredLikelihood:
    """Measure it and write the figures to `out`, or find them there. Collective.

    each: whether the nats of every sample are wanted, which files of older versions lack: they are measured anew. out:
    a JSON file; none = RUN/likelihood/..., named by data, step, weights and protocol. Raises OutputError where other
    figures are there (overwrite: they are replaced), DataError for data unlike those of the run, Stopped where asked
    says so. Batches that are done are kept beside `out` until all are: started again, it goes on with the others.
    """
    manifest = Manifest.load(data)
    check_same_data(trained.contract, manifest, str(trained.path), data)
    of = LikelihoodOf(trained.denoiser(world.device, precision), trained.norm, manifest, spec)
    record = _identity(trained, of.protocol(precision))
    file = Path(expand(out)) if out else _default_place(trained, manifest, record["protocol_hash"])
    held = group.on_main(lambda: claim([file], record, record=file, overwrite=overwrite))
    if held is not None and (NATS in held or not each):
        return MeasuredLikelihood(held, file, is_new=False)
    where = {"checkpoint": str(trained.path), "device": world.device.type, "code": code_version()}
    begun = {**record, "batch_size": batch_size}
    with unfinished(file, {**begun, **where}, begun, (of.count, batch_size), overwrite) as blocks:
        nats = of.measure(blocks, world, asked)
        figures = of.summary(nats) | record
        group.on_main(lambda: write_record(file, {**figures, **where, NATS: nats.tolist()}))
    return MeasuredLikelihood({**figures, NATS: nats.tolist()}, file, is_new=True)


@dataclass(frozen=True)
class LikelihoodDifference:
    """Bits per dimension of one model less another's, of the same samples; the standard error is that of the pairs."""

    mean: float
    standard_error: float
    samples: int

    @classmethod
    def of(cls, one: Mapping[str, Any], other: Mapping[str, Any]) -> LikelihoodDifference:
        """From two records with the nats of each sample. ConfigError where they are not of the same samples.

        Bits are of latents as the codec gives them, so that it does not matter what each model normalises them by.
        """
        a, b = one["protocol"], other["protocol"]
        own = ("norm", "precision")
        shared = [{key: value for key, value in protocol.items() if key not in own} for protocol in (a, b)]
        rows = differences(shared[0], shared[1])
        if rows:
            raise ConfigError("\n".join(["the two likelihoods are not of the same samples:", *rows]))
        shift = [record["bits_per_dim_stored"] - record["bits_per_dim"] for record in (one, other)]
        bits = [
            bits_per_dim(torch.tensor(record[NATS], dtype=torch.float64), record["dimensions"]) + added
            for record, added in zip((one, other), shift, strict=True)
        ]
        pairs = bits[0] - bits[1]
        return cls(float(pairs.mean()), float(pairs.std()) / math.sqrt(len(pairs)), len(pairs))

    def __str__(self) -> str:
        return (
            f"{self.mean:+.4f} +- {self.standard_error:.4f} bits/dim: the first less the second, of the same "
            f"{self.samples} samples, draws and probes (below 0: the first one finds them likelier)"
        )


def _identity(trained: Trained, protocol: dict[str, Any]) -> dict[str, Any]:
    """What decides about the figures: two files that agree in it hold the same."""
    which = {"weights": trained.weights, "step": trained.step, "digest": trained.digest}
    return {"protocol": protocol, "protocol_hash": protocol_hash(protocol), **which}


def _default_place(trained: Trained, manifest: Manifest, digest: str) -> Path:
    """Under the run directory, named by the data, the step, the weights and the protocol."""
    name = f"{Path(manifest.root).absolute().name}-step-{trained.step:08d}-{trained.weights}-{digest}.json"
    return trained.run_dir / "likelihood" / name
