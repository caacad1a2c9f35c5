"""How likely a trained model finds data: bits per dimension of their latents."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen()  # before seconds of imports
    from dit.commandline.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

from dit.commandline.argv import Tool
from dit.commandline.cli import run
from dit.config import ConfigError, Registry, from_dict
from dit.configfile import overridden
from dit.evals.bits import LikelihoodSpec
from dit.experiments.likelihoods import LikelihoodDifference, likelihood_of
from dit.experiments.trained import Trained
from dit.ranks import group
from dit.ranks.asked import EndAsked
from dit.sample.likelihood import LIKELIHOODS

CHOICES: dict[str, Registry[Any]] = {"method": LIKELIHOODS}


def main(
    run_or_ckpt: Annotated[str, "a run directory or one checkpoint in it"],
    data: Annotated[str, "folder of latent shards, best held out from training"],
    *,
    out: Annotated[str | None, "file for the figures; none = RUN/likelihood/DATA-step-...json"] = None,
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
    against: Annotated[str | None, "another run: the difference on the same samples, with its error"] = None,
    overwrite: Annotated[bool, "replace other figures there"] = False,
    **method_keys: str,
) -> None:
    """Print and write the mean bits per dimension of data, with its standard error and protocol.

    The density is that of the latents as the model sees them, normalised to unit variance: the bits are per
    dimension of a latent, not of a pixel, and an encoder with smaller latents may have more. Compare models on
    the same latents alone. "bits_per_dim_stored" is of the latents as the codec gives them: log2 std of the
    normalisation added, per dimension. Moments are drawn from once. Pixels are not dequantised: for those,
    --method=bound --method.decoder=discretised bounds the probability of 256 levels, where latents.norm was codec.
    Stopped by a signal (status 75) or killed, it goes on with the batches that lack when started again.
    """
    own = {"num_steps": num_steps, "divergence": "exact" if exact else None, "divergence.probes": probes}
    keys = {f"method.{name}": str(value) for name, value in own.items() if value is not None}
    spec = read_spec({"method": method, "count": count, "seed": seed}, unconditional, keys, method_keys)
    if count < 0 or count == 1 or batch_size < 1:
        raise ConfigError(f"count {count} must be 0 or at least 2 and batch_size {batch_size} at least 1")
    found = []
    with EndAsked().listening() as asked, group.session() as world:
        for named in filter(None, (run_or_ckpt, against)):
            trained = group.together(partial(Trained.load, named, weights, world.device))
            to = (batch_size, trained.precision(precision), world, None if found else out, overwrite)
            measured = likelihood_of(trained, data, spec, *to, each=against is not None, asked=asked)
            found.append(measured.figures)
            if world.is_main:
                trained.say_weights()
                print(measured)
        if world.is_main and len(found) > 1:
            print(LikelihoodDifference.of(*found))


def read_spec(
    values: Mapping[str, Any], unconditional: bool, keys: Mapping[str, str], given: Mapping[str, str]
) -> LikelihoodSpec:
    """The spec of the plain values with the method's keys over them; ConfigError for one that is given twice."""
    dotted = {re.sub(r"^method_", "method.", key): text for key, text in given.items()}
    twice = sorted(keys.keys() & dotted.keys())
    if twice:
        raise ConfigError(f"--{twice[0]} is given twice")
    plain = {**values, "unconditional": unconditional}
    return from_dict(LikelihoodSpec, overridden(LikelihoodSpec, plain, {**keys, **dotted})[0])


TOOL = Tool(main, choices=CHOICES)

if __name__ == "__main__":
    run(TOOL)
