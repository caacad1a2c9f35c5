"""Images a second of our sampler beside the same network called in a plain loop, and what guidance costs (P6).

All contenders call one network, in one dtype, and take turns; a turn is one whole batch, from the noise to latents
that were looked at. Decoding is left out: it runs behind the drawing of the next batch (`dit/sample/behind.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dit.bench.sampling.plain import PlainSampler
from dit.bench.speed.bounds import bound_line
from dit.bench.speed.steppers import CHANNELS, CLASSES, SIDE
from dit.bench.speed.turns import Contender, MedianRange, ratio, take_turns
from dit.config import ConfigError, config, from_dict
from dit.flow.path import Linear
from dit.flow.predict import Velocity
from dit.model.cost import cost
from dit.model.dit import DiTConfig
from dit.ranks import group
from dit.sample.denoise import with_precision
from dit.sample.generate import Sampler, SamplerSpec

PLAIN, OURS = "plain loop", "ours"
PLAIN_UNGUIDED, UNGUIDED, INTERVAL = "plain loop, no guidance", "ours, no guidance", "ours, in the interval"
FASTER, DEARER = 1.0, 1.4  # ours over the plain loop, at least; guidance in its interval over none, at most


@config
class SampleBench:
    """What is drawn. A turn is one batch."""

    size: str = "S"  # of the model: S, B, L, XL; nano, micro, tiny
    patch: int = 2  # latent pixels of a patch, on a side
    batch: Annotated[int, Field(ge=1)] = 4  # images at a time; twice as many rows with guidance
    solver: Literal["euler", "heun"] = "heun"  # of ours and of the plain loop
    num_steps: Annotated[int, Field(ge=1)] = 8  # of the solver
    scale: float = 1.5  # of classifier-free guidance
    interval: tuple[float, float] = (0.25, 0.6)  # of t, for the guidance that has one
    precision: Literal["fp32", "bf16"] = "fp32"  # of every contender
    compile: bool = False  # the blocks, with torch.compile
    repeats: Annotated[int, Field(ge=1)] = 5  # turns of each contender

    def __post_init__(self) -> None:
        from_dict(DiTConfig, {"size": self.size, "patch": self.patch})
        if self.scale == 1.0:
            raise ConfigError("scale is 1, which is no guidance, and that is what is measured")
        self.spec(self.guidance())

    def spec(self, guidance: list[dict[str, Any]]) -> SamplerSpec:
        """What ours draws by."""
        how = {"solver": self.solver, "num_steps": self.num_steps, "guidance": guidance}
        return from_dict(SamplerSpec, how)

    def guidance(self, **fields: Any) -> list[dict[str, Any]]:
        """Guidance as a spec has it, by default in its interval."""
        return [{"name": "cfg", "scale": self.scale, "interval": self.interval, **fields}]


class Bench:
    """The network and the contenders, on a device."""

    def __init__(self, cfg: SampleBench, device: torch.device):
        self.cfg, self.device = cfg, device
        model = DiTConfig(size=cfg.size, patch=cfg.patch)
        torch.manual_seed(0)
        module = model.build(SIDE, CHANNELS, CLASSES).eval().requires_grad_(False)
        stir(module)
        if cfg.compile:
            module.compile_blocks()
        self.network = with_precision(module.to(device), device, cfg.precision)
        self.label = torch.arange(cfg.batch) % CLASSES
        self.flops = cost(model, SIDE, CHANNELS, CLASSES).forward_flops  # of one row
        self.samplers = {
            OURS: self.sampler(cfg.guidance(interval=(0.0, 1.0))),
            UNGUIDED: self.sampler([]),
            INTERVAL: self.sampler(cfg.guidance()),
        }

    def sampler(self, guidance: list[dict[str, Any]]) -> Sampler:
        """Ours."""
        spec = self.cfg.spec(guidance)
        shape = (CHANNELS, SIDE, SIDE)
        how = (self.network, Linear(), Velocity(), lambda x: x, shape, spec, self.device)
        return Sampler(*how, classes=CLASSES)

    def plain(self, scale: float) -> PlainSampler:
        """The loop."""

        def velocity(x: Tensor, t: Tensor, label: Tensor, drop: Tensor) -> Tensor:
            return self.network(x, 1000 * t, {"label": label, "drop": drop})

        return PlainSampler(velocity, self.cfg.num_steps, scale, self.cfg.solver == "heun")

    def contenders(self) -> Iterator[Contender]:
        """All of them."""
        for name, scale in ((PLAIN, self.cfg.scale), (PLAIN_UNGUIDED, 1.0)):
            yield Contender(name, self._turn(self._plainly(self.plain(scale))))
        for name, sampler in self.samplers.items():
            yield Contender(name, self._turn(self._ours(sampler)))

    def _plainly(self, loop: PlainSampler) -> Callable[[int], Tensor]:
        label = self.label.to(self.device)

        def draw(turn: int) -> Tensor:
            return loop(torch.randn(self.cfg.batch, CHANNELS, SIDE, SIDE, device=self.device), label)

        return draw

    def _ours(self, sampler: Sampler) -> Callable[[int], Tensor]:
        def draw(turn: int) -> Tensor:
            first = turn * self.cfg.batch
            return sampler.latents(torch.arange(first, first + self.cfg.batch), self.label)

        return draw

    def _turn(self, draw: Callable[[int], Tensor]) -> Callable[[int], int]:
        def run(turn: int) -> int:
            float(draw(turn).abs().max())  # waits for the device
            return self.cfg.batch

        return run


def run(cfg: SampleBench, progress: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Measure; JSON values. progress: called `turns(cfg)` times."""
    with group.session() as world:
        bench = Bench(cfg, world.device)
        found = take_turns(list(bench.contenders()), cfg.repeats, progress=progress)
        rates = {
            name: its.rate if world.device.type == "cuda" else _by_cpu(its.cpu) for name, its in found.items()
        }
    steps = {name: s.tally.evaluations / s.tally.images for name, s in bench.samplers.items()}
    return {
        "images_per_s": {name: vars(MedianRange.of(its.rate)) for name, its in found.items()},
        "cpu_ms_an_image": {
            name: vars(MedianRange.of([us / 1e3 for us in its.cpu])) for name, its in found.items()
        },
        "evaluations": steps,
        "flops_an_image": {name: rows * bench.flops for name, rows in steps.items()},
        "of_plain": vars(ratio(rates[OURS], rates[PLAIN])),
        "of_plain_unguided": vars(ratio(rates[UNGUIDED], rates[PLAIN_UNGUIDED])),
        "guided_cost": vars(ratio(rates[UNGUIDED], rates[OURS])),
        "interval_cost": vars(ratio(rates[UNGUIDED], rates[INTERVAL])),
    }


def turns(cfg: SampleBench) -> int:
    """Say how often `run` calls its progress."""
    return 5 * (1 + cfg.repeats)


def lines(found: dict[str, Any], cfg: SampleBench, enough: bool) -> Iterator[str]:
    """The figures as a table."""
    yield f"{'':26s} {'images/s':>24s} {'CPU ms an image':>24s} {'evaluations':>12s}"
    for name, rate in found["images_per_s"].items():
        cpu, evaluations = MedianRange(**found["cpu_ms_an_image"][name]), found["evaluations"].get(name)
        rows = "" if evaluations is None else f"{evaluations:.4g}"
        yield f"{name:26s} {MedianRange(**rate)!s:>24s} {cpu!s:>24s} {rows:>12s}"
    yield bound_line("ours / plain loop", found["of_plain"], FASTER, enough)
    yield f"{'the same, no guidance':28s} {MedianRange(**found['of_plain_unguided'])}"
    yield f"{'guidance / none, cost':28s} {MedianRange(**found['guided_cost'])}"
    low, high = cfg.interval
    yield bound_line(
        f"in [{low:g}, {high:g}] / none, cost", found["interval_cost"], DEARER, enough, most=True
    )


def _by_cpu(cpu: list[float]) -> list[float]:
    """Images a second of CPU time, whose other work then does not count."""
    return [1e6 / us for us in cpu]


@torch.no_grad()
def stir(module: nn.Module) -> None:
    """Give layers that start at zero small weights: by zeros a network says nothing, whatever is wrong in it."""
    for p in module.parameters():
        if not bool(p.any()):
            nn.init.normal_(p, std=0.02)
