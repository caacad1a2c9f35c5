"""The velocity error: one figure for networks of any path and prediction, at the same (sample, noise level, eps).

Held-out losses of unlike objectives are of unlike things. What is compared instead is what the network takes data and
eps for, in the straight path's velocity: the mean square of (eps' − data') − (eps − data), at uniform times of the
straight path. A network of another path gets x = alpha·data + sigma·eps of its own path at the time of the same
sigma / alpha (SiT, arXiv 2401.08740, has the conversion); on discrete paths that is the nearest step, as in sampling.
For a velocity network on the straight path this is its training loss at uniform times.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dit.data.shards.manifest import Manifest
from dit.evals import record
from dit.evals.protocol import protocol_hash
from dit.evals.valloss import held_out_loss
from dit.experiments.diffusion import Experiment
from dit.experiments.trained import Trained
from dit.flow.loss import Loss
from dit.flow.objective import Objective
from dit.flow.path import Linear
from dit.flow.predict import usable
from dit.flow.spread import Stratified
from dit.ranks.world import World
from dit.rng import Purpose
from dit.sample.denoise import Denoiser
from dit.train.held_out import HeldOut, open_held_out
from dit.train.task import LatentTask, Samples

FIGURE = "velocity_error"
STRAIGHT = Linear()


def error(denoiser: Denoiser, task: LatentTask, samples: Samples) -> Loss:
    """Give the squared velocity errors of a micro-batch, with the straight path's times that they are at."""
    data = task.norm.draw(samples.moments, samples.draws)
    eps = samples.draws.normal(Purpose.EPS, data.shape[1:]) if samples.eps is None else samples.eps
    batch = samples.draws.batch
    t = ((Stratified()(samples.draws).double() * batch).floor() + 0.5) / batch
    low, high = usable(denoiser.path, denoiser.prediction)
    own = denoiser.path.snap(denoiser.path.time_at(STRAIGHT.log_snr(t))).clamp(low, high).float()
    cond = {"label": samples.label, "drop": samples.drop}
    ends = denoiser(denoiser.path.coeffs(own).mix(data, eps), own, cond)
    each = ((ends.eps - ends.data) - (eps - data)).square().flatten(1).mean(1)
    return Loss(each.mean(), each, t, {})


def velocity_errors(trained: Trained, held_out: HeldOut, device: torch.device) -> dict[str, float]:
    """Give the mean error and those of quarters of t: "velocity_error", "velocity_error_q1", ..."""
    task = LatentTask(Objective(), trained.norm, 0.0, False)
    denoiser = trained.denoiser(device, trained.experiment.train.precision)

    def losses() -> Iterator[Loss]:
        for step in range(held_out.steps):
            for samples in held_out.micro_batches(task, step, device):
                found = error(denoiser, task, samples)
                yield found if samples.valid is None else found.where(samples.valid)

    with torch.no_grad():
        found = held_out_loss(losses())
    return {name.replace("loss", FIGURE): value for name, value in found.items()}


def measure_velocity(cfg: Experiment, manifest: Manifest) -> bool:
    """Add a complete run's velocity errors at its last step to its evaluations.jsonl; False where they are there.

    Of EMA weights, on the held-out samples and draws of every run on these data. Raises CheckpointError where the run
    has no checkpoint.
    """
    world = World()
    held_out = open_held_out(cfg, manifest, LatentTask(Objective(), cfg.norm(manifest), 0.0, False), world)
    assert held_out is not None  # an ablation has data.val, and measures there
    protocol = {"figure": FIGURE, "path": "linear", "times": held_out.grid, **held_out.protocol}
    digest = protocol_hash(protocol)
    step = cfg.train.steps
    if any((row["step"], row["hash"]) == (step, digest) for row in record.read(cfg.folder)):
        return False
    trained = Trained.load(str(cfg.folder), "ema", world.device)
    row = {
        "by": "ablation",
        "step": trained.step,
        **trained.average.row,
        "figures": velocity_errors(trained, held_out, world.device),
        "protocol": protocol,
        "hash": digest,
    }
    record.append(cfg.folder, [row])
    return True
