"""How likely a trained model finds data: bits per dimension of their latents."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dit.cli import run
from dit.config import ConfigError, Registry, config, from_dict, to_dict
from dit.configfile import overridden
from dit.data import DataError
from dit.data.codecs.codec import check_same_codec
from dit.data.shards.blocks import BlockReader
from dit.data.shards.manifest import Manifest
from dit.data.shards.readers import open_reader
from dit.evals.protocol import protocol_hash
from dit.experiments.trained import Trained
from dit.files import expand, write_atomically
from dit.ranks import group
from dit.rng import Draws
from dit.sample.denoise import Denoiser, with_precision
from dit.sample.likelihood import LIKELIHOODS, Likelihood, Ode, Problem, bits_per_dim
from dit.version import code_version

CHOICES: dict[str, Registry[Any]] = {"method": LIKELIHOODS}


@config
class Spec:
    """Everything that decides about the figure besides weights and data."""

    method: Annotated[Likelihood, LIKELIHOODS] = Ode()  # how log p(data) is found
    count: int = 256  # samples, the first of the data; 0 = all
    seed: int = 0  # of probes, noise and posterior draws
    unconditional: bool = False  # drop every label


def main(
    run_or_ckpt: Annotated[str, "a run directory or one checkpoint in it"],
    data: Annotated[str, "folder of latent shards, best held out from training"],
    *,
    out: Annotated[str, "file for the figures, as JSON"] = "likelihood.json",
    count: Annotated[int, "samples, the first of the data, which are in random order; 0 = all"] = 256,
    method: Annotated[str, "ode or bound; its fields are --method.field=value"] = "ode",
    num_steps: Annotated[int | None, "the same as --method.num_steps; none = the method's own"] = None,
    exact: Annotated[bool, "ode: the exact divergence, one backward pass a dimension"] = False,
    probes: Annotated[int | None, "ode: Hutchinson's probes per evaluation; none = 1"] = None,
    unconditional: Annotated[bool, "drop every label, else log p(data | label)"] = False,
    seed: Annotated[int, "of probes, noise and posterior draws; sample i has its own"] = 0,
    batch_size: Annotated[int, "samples at a time and rank"] = 64,
    weights: Annotated[str, "which weights: ema, model, or another average, as ema_0.999"] = "ema",
    precision: Annotated[Literal["run", "fp32", "bf16"], "of matrix products; run = as in training"] = "fp32",
    **method_keys: str,
) -> None:
    """Print and write the mean bits per dimension of data, with its standard error and protocol.

    The density is that of the latents as the model sees them, normalised to unit variance: the bits are per
    dimension of a latent, not of a pixel, and an encoder with smaller latents may have more. Compare models on
    the same latents alone. "bits_per_dim_stored" is of the latents as the codec gives them: log2 std of the
    normalisation added, per dimension. Moments are drawn from once. Pixels are not dequantised: for those,
    --method=bound --method.decoder=discretised bounds the probability of 256 levels, if latents.norm is codec.
    """
    shortcuts = {"num_steps": num_steps, "divergence": "exact" if exact else None}
    keys = {f"method.{name}": str(value) for name, value in shortcuts.items() if value is not None}
    keys |= {} if probes is None else {"method.divergence.probes": str(probes)}
    spec = read_spec({"method": method, "count": count, "seed": seed}, unconditional, keys, method_keys)
    if count < 0 or count == 1 or batch_size < 1:
        raise ConfigError(f"count {count} must be 0 or at least 2 and batch_size {batch_size} at least 1")
    with group.session() as world:
        trained, manifest = Trained.load(run_or_ckpt, weights, world.device), Manifest.load(data)
        check(trained, manifest, data)
        chosen = trained.experiment.train.precision if precision == "run" else precision
        nats = measure(trained, manifest, spec, batch_size, chosen, world)
        figures = summary(nats, trained, manifest)
        protocol = {**to_dict(spec), "count": len(nats), "data": manifest.digest, "precision": chosen}
        protocol["norm"] = to_dict(trained.norm)  # of other latents the figure is another
        figures |= {"protocol": protocol, "protocol_hash": protocol_hash(protocol), "weights": weights}
        figures |= {"checkpoint": str(trained.path), "step": trained.step, "device": world.device.type}
        if world.is_main:
            write(Path(expand(out)), figures)


def write(out: Path, figures: dict[str, Any]) -> None:
    """The figures as JSON, and the mean with its error on the screen."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**figures, "code": code_version()}, indent=1) + "\n"
    write_atomically(out, text.encode())
    print(
        f"{figures['bits_per_dim']:.4f} +- {figures['standard_error']:.4f} bits/dim of normalised latents "
        f"({figures['samples']} samples, protocol {figures['protocol_hash']}) in {out}"
    )


def read_spec(
    values: Mapping[str, Any], unconditional: bool, keys: Mapping[str, str], given: Mapping[str, str]
) -> Spec:
    """The spec of the plain values with the method's keys over them; ConfigError for one that is given twice."""
    dotted = {re.sub(r"^method_", "method.", key): text for key, text in given.items()}
    twice = sorted(keys.keys() & dotted.keys())
    if twice:
        raise ConfigError(f"--{twice[0]} is given twice")
    plain = {**values, "unconditional": unconditional}
    return from_dict(Spec, overridden(Spec, plain, {**keys, **dotted})[0])


def check(trained: Trained, manifest: Manifest, named: str) -> None:
    """DataError for latents that the model was not trained on the like of."""
    contract = trained.contract
    check_same_codec(contract["codec"], manifest.codec, str(trained.path), named)
    found = {"shape": [manifest.channels, *manifest.input_size], "classes": list(manifest.classes)}
    for name, value in found.items():
        if contract[name] != value:
            raise DataError(
                f"{named} and {trained.path} differ in {name}: {value!r} against {contract[name]!r}; encode "
                "the data as those of the run were"
            )


def measure(
    trained: Trained, manifest: Manifest, spec: Spec, batch_size: int, precision: str, world: group.World
) -> Tensor:
    """(count,) float64 nats on every rank; sample i is the i-th of the data, whatever is computed with it."""
    total = min(spec.count or manifest.samples, manifest.samples)
    model, objective = trained.model.requires_grad_(False), trained.experiment.objective
    network = with_precision(model, world.device, precision)
    denoise = Denoiser(network, objective.path, objective.prediction)
    reader, found = open_reader(manifest), {}
    starts = range(0, total, batch_size)[world.rank :: world.size]
    for start in tqdm(starts, unit="batch", disable=not world.is_main, desc=LIKELIHOODS.name_of(spec.method)):
        index = torch.arange(start, min(start + batch_size, total))
        moments, label = (v.to(world.device) for v in samples(reader, index))
        slots = index.to(world.device)
        drop = torch.full_like(label, spec.unconditional, dtype=torch.bool)
        latents = trained.norm.draw(moments, Draws(spec.seed, 0, slots, 1))
        cond = {"label": label, "drop": drop}
        problem = Problem(denoise, objective.path, objective.prediction, cond, slots, spec.seed)
        found[start] = spec.method(problem, latents).cpu()
    everywhere = {k: v for part in group.gather_objects(found) for k, v in part.items()}
    return torch.cat([everywhere[start] for start in sorted(everywhere)])


def samples(reader: BlockReader, index: Tensor) -> tuple[Tensor, Tensor]:
    """Moments (n, 2 or 1, C, H, W) and labels (n,) of consecutive samples in stored order, in their first view."""
    manifest, moments, labels, position = reader.manifest, [], [], 0
    for i, block in enumerate(manifest.blocks):
        inside = index[(index >= position) & (index < position + block.samples)].numpy() - position
        position += block.samples
        if len(inside):
            arrays = reader.read(i)
            moments.append(arrays[manifest.array][inside, 0])
            labels.append(arrays["label"][inside])
    stacked = torch.from_numpy(np.concatenate(moments))
    stacked = stacked if manifest.array == "moments" else stacked.unsqueeze(1)
    return stacked, torch.from_numpy(np.concatenate(labels))


def summary(nats: Tensor, trained: Trained, manifest: Manifest) -> dict[str, Any]:
    """The figures of nats (n,), n > 1; the standard error is over samples."""
    dimensions = manifest.channels * math.prod(manifest.input_size)
    bits = bits_per_dim(nats, dimensions)
    stored = sum(math.log2(std) for std in trained.norm.std) / len(trained.norm.std)
    mean, error = float(bits.mean()), float(bits.std()) / math.sqrt(len(bits))
    return {
        "bits_per_dim": mean,
        "standard_error": error,
        "bits_per_dim_stored": mean + stored,
        "nats": float(nats.mean()),
        "samples": len(nats),
        "dimensions": dimensions,
    }


if __name__ == "__main__":
    run(main, choices=CHOICES)
