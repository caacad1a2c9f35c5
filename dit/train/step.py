"""A step's passes over its micro-batches; and the whole step as one CUDA graph, launched at once (train.graphs)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dit.config import ConfigError
from dit.flow.loss import Loss
from dit.rng import Draws
from dit.train.engines.base import Engine
from dit.train.engines.plain import PlainEngine
from dit.train.faults import TrainingError
from dit.train.optim import GuardedAdamW
from dit.train.task import Samples, Task, guarded, loss_of

EAGER = 3  # steps before one is captured: compilers, NCCL and cuBLAS set up in them what no graph may


def passes(
    task: Task,
    engine: Engine,
    samples: Samples,
    micro: int,
    max_loss: float | None,
    timing: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> list[Loss]:
    """Go forward and backward through a rank's share of a step, `micro` samples at a time; give their losses.

    max_loss: see `guarded`. timing: makes a context for each forward pass.
    """
    losses = []
    for part in samples.micro_batches(micro):
        with timing():
            loss = loss_of(task, engine, part)
        engine.backward(guarded(loss, max_loss))
        losses.append(loss)
    return losses


class StepGraph:
    """A training step up to its averages as one CUDA graph: passes, mean over ranks, clipping, AdamW.

    Where a model is small the GPU waits for the host to launch each of thousands of kernels; a graph launches them all
    at once, and their order, addresses and arithmetic are those that were captured. What differs from step to step is
    copied into the tensors that it was captured with: samples, draws (slots, and the step as a tensor) and learning
    rates. The first steps of a process do the same uncaptured, on the stream of the capture.
    """

    def __init__(self, task: Task, engine: PlainEngine, micro: int, max_loss: float | None):
        """ConfigError for an optimizer whose update is another than `launch_update`'s."""
        if type(engine.optimizer) is not GuardedAdamW:
            raise ConfigError(
                f"train.graphs captures AdamW's update, and the optimizer is {type(engine.optimizer).__name__}: leave "
                "train.graphs out, or take AdamW as it is by default"
            )
        self.task, self.engine, self.micro, self.max_loss = task, engine, micro, max_loss
        engine.fragments()  # the optimizer's state must be there before anything is captured
        self._rates = [_rate(engine.device) for _ in engine.optimizer.param_groups]
        self._step = torch.zeros((), dtype=torch.int64, device=engine.device)
        self._samples: Samples | None = None
        self._norm: Tensor | None = None
        self._losses: list[Loss] = []
        self._stream = torch.cuda.Stream(engine.device) if engine.device.type == "cuda" else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._launched = 0

    def __call__(self, samples: Samples, lr: float) -> tuple[list[Loss], bool]:
        """Do a step of samples of which none is missing; whether its update was applied.

        The losses' tensors are the graph's own: the next step overwrites them.
        """
        self._take(samples, lr)
        self._launched += 1
        if self._stream is None:
            self.body()
        elif self._launched <= EAGER:
            self._run_beside(self._stream)
        else:
            if self._graph is None:
                self._graph = self._captured(self._stream)
            self._graph.replay()
        assert self._norm is not None
        return self._losses, self.engine.conclude(self._norm)

    def close(self) -> None:
        """Give the graph's memory back; before the ranks part, as NCCL's connections are in it."""
        if self._graph is not None:
            self._graph.reset()
        self._graph, self._norm, self._losses = None, None, []

    def body(self) -> None:
        """Do what is captured: everything from the tensors that are kept to those that are kept."""
        assert self._samples is not None
        losses = passes(self.task, self.engine, self._samples, self.micro, self.max_loss)
        self._norm = self.engine.launch_step(self._rates)
        # an autograd graph that outlived its step would bring that step's streams into the next one's
        self._losses = [_detached(loss) for loss in losses]

    def _take(self, samples: Samples, lr: float) -> None:
        """Copy what is new into the tensors that are kept."""
        groups = self.engine.optimizer.param_groups
        for rate, group in zip(self._rates, groups, strict=True):
            rate.fill_(lr * group["lr_factor"])
        if self._samples is None:
            self._samples = _kept(samples, self._step)
        for kept, new in zip(_tensors(self._samples), _tensors(samples), strict=True):
            kept.copy_(new)
        self._step.fill_(samples.draws.step)

    def _run_beside(self, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.body()
        torch.cuda.current_stream().wait_stream(stream)

    def _captured(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        """Capture the body, which runs nothing. TrainingError where it waits for the device, or is not to be captured.

        thread_local: other threads read data, write checkpoints and watch NCCL meanwhile.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.body()
        except RuntimeError as error:
            first = str(error).split("\n", 1)[0]
            raise TrainingError(
                f"train.graphs: this run's step cannot be captured as a CUDA graph ({first}): something in it waits "
                "for the GPU or is decided on the host. Start again without train.graphs; the run goes on"
            ) from error
        return graph


def _rate(device: torch.device) -> Tensor:
    """A learning rate on the device: in float32, which the GPU's AdamW reads; the CPU's reads it as a double."""
    return torch.zeros((), dtype=torch.float32 if device.type == "cuda" else torch.float64, device=device)


def _kept(samples: Samples, step: Tensor) -> Samples:
    """The same in tensors of its own, with the draws of a step that is a tensor too."""
    draws = samples.draws
    return replace(samples, **_cloned(samples), draws=replace(draws, **{**_cloned(draws), "step": step}))


def _cloned(parts: Samples | Draws) -> dict[str, Any]:
    return {name: part.clone() for name, part in vars(parts).items() if isinstance(part, Tensor)}


def _tensors(samples: Samples) -> list[Tensor]:
    """What of samples differs from step to step, but for the step itself."""
    parts = (samples, samples.draws)
    named = [(name, part) for of in parts for name, part in vars(of).items() if name != "step"]
    return [part for _, part in named if isinstance(part, Tensor)]


def _detached(loss: Loss) -> Loss:
    named = {name: part.detach() for name, part in vars(loss).items() if isinstance(part, Tensor)}
    return replace(loss, **named, metrics={name: value.detach() for name, value in loss.metrics.items()})
