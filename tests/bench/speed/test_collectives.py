"""Bytes moved per step at each ZeRO stage, against the formula and against DeepSpeed's own log (P3)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as td

from dit.bench.speed.collectives import Collective, CollectiveCounter, formula
from dit.train.loop import Loop
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import BATCH, Values, built, values

# deeper than nano: the last block's parameters are still there when the backward pass begins
MODEL = {"size": None, "width": 32, "depth": 8, "heads": 2}


# --- counting ----------------------------------------------------------------------------------------------


def every_collective() -> Counter[Collective]:
    whole, part = torch.ones(8), torch.ones(4, dtype=torch.bfloat16)
    with CollectiveCounter() as counter:
        td.all_reduce(whole)
        td.reduce(whole, 0)
        td.broadcast(whole, 1)
        td.all_gather_into_tensor(torch.empty(8, dtype=torch.bfloat16), part)
        td.all_gather([torch.empty(4), torch.empty(4)], torch.ones(4))
        td.reduce_scatter_tensor(torch.empty(4), whole)
        td.barrier()
    return counter.found


def test_each_collective_is_counted_by_the_whole_tensor(ranks: Server) -> None:
    for found in ranks.run(2, every_collective):
        assert found == {
            Collective("all_reduce", torch.float32, 8, 2): 1,
            Collective("reduce", torch.float32, 8, 2): 1,
            Collective("broadcast", torch.float32, 8, 2): 1,
            Collective("all_gather", torch.bfloat16, 8, 2): 1,
            Collective(
                "all_gather", torch.float32, 4, 2
            ): 2,  # a list of tensors, which together are the whole
            Collective("reduce_scatter", torch.float32, 8, 2): 1,
        }


def test_the_ring_sends_what_the_textbook_says() -> None:
    for op, share in {"all_reduce": 1.5, "all_gather": 0.75, "reduce_scatter": 0.75, "reduce": 0.75}.items():
        assert Collective(op, torch.float32, 10, 4).sent == share * 40
        assert Collective(op, torch.bfloat16, 10, 4).sent == share * 20


def test_the_formula() -> None:
    """2 psi for stages 0 to 2 and 3 psi for 3, each times (N - 1) / N; micro-batches are reduced one by one from 2."""
    assert [formula(stage, 1000, 4, 1) for stage in (0, 1, 2, 3)] == [1500, 1500, 1500, 2250]
    assert [formula(stage, 1000, 4, 3) for stage in (0, 1, 2, 3)] == [1500, 1500, 3000, 6750]


# --- a step ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """psi: bytes of the gradients in fp32. found: what was counted; logged: bytes by operation, of DeepSpeed."""

    psi: int
    sent: float
    found: Counter[Collective]
    logged: dict[str, int]

    def bytes_of(self, op: str, dtype: torch.dtype | None = None) -> int:
        return sum(k.payload * n for k, n in self.found.items() if k.op == op and dtype in (None, k.dtype))


def steps(runs: list[Values]) -> list[Step]:
    """The third step of each run: stage 3 knows by then in what order parameters are used."""
    return [_step(given) for given in runs]


def _step(given: Values) -> Step:
    from deepspeed import comm

    run = built(given)
    loop = Loop(run)
    for step in (0, 1):
        loop.train_step(run.feed.stream.batch(step))
    batch, logger = run.feed.stream.batch(2), comm.comm.comms_logger
    logger.reset_data()
    comm.configure(enabled=True, prof_all=True)
    with CollectiveCounter() as counter:
        loop.train_step(batch)
    comm.configure(enabled=False)
    run.feed.stream.close()
    logged = {op: sum(size * row[0] for size, row in by.items()) for op, by in logger.comms_dict.items()}
    parameters: list = [p for p in run.engine.module.parameters() if p.requires_grad]
    psi = 4 * sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    return Step(psi, counter.sent(), counter.found, logged)


def runs_of(digits: Digits, folder: Path, size: int, choices: list[dict], **train: object) -> list[Values]:
    found = []
    for i, zero in enumerate(choices):
        sections = {"micro_batch": BATCH // size, **train}
        found.append(values(digits, folder / str(i), model=MODEL, train=sections, zero=zero))
    return found


STAGES = [{"stage": stage} for stage in (0, 1, 2, 3)]


def test_a_step_moves_what_the_formula_says(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    """Within 1%, but for stage 3's last block: it is not gathered anew when the backward pass begins with it."""
    for found in ranks.run(2, steps, runs_of(digits, tmp_path, 2, STAGES)):
        for stage, step in enumerate(found):
            assert step.sent == pytest.approx(formula(stage, step.psi, 2, 1), rel=0.1 if stage == 3 else 0.01)
            _check_log(step, 2)


def test_plain_torch_moves_what_stage_0_does(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    """Once a step, however many micro-batches there are."""
    runs = [
        values(digits, tmp_path / str(micro), model=MODEL, engine="plain", train={"micro_batch": micro})
        for micro in (BATCH // 2, BATCH // 8)
    ]
    for found in ranks.run(2, steps, runs):
        for step in found:
            assert step.sent == formula(0, step.psi, 2, 1)
            assert {kind.op for kind in step.found} == {"all_reduce"}


def _check_log(step: Step, ranks: int) -> None:
    """DeepSpeed's log has the same; an all-gather by what one rank gives."""
    names = {"all_reduce": 1, "reduce": 1, "reduce_scatter_tensor": 1, "all_gather_into_tensor": ranks}
    assert set(step.logged) <= set(names)
    for name, factor in names.items():
        op = name.removesuffix("_tensor").removesuffix("_into")
        assert factor * step.logged.get(name, 0) == step.bytes_of(op), name


@pytest.mark.slow
def test_four_ranks_and_accumulation(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    runs = [
        *runs_of(digits, tmp_path / "1", 4, STAGES),
        *runs_of(digits, tmp_path / "4", 4, STAGES, micro_batch=2),
    ]
    found = ranks.run(4, steps, runs)[0]
    for i, step in enumerate(found):
        stage, accumulation = i % 4, (1, 4)[i // 4]
        assert step.sent == pytest.approx(formula(stage, step.psi, 4, accumulation), rel=0.1), (i, stage)


@pytest.mark.slow
def test_a_second_copy_keeps_the_backward_passes_gathers_within_its_group(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    """Parameters change once a step, and so their copy: all gathers but the first are among 2 of the 4 ranks."""
    [step] = ranks.run(4, steps, runs_of(digits, tmp_path, 4, [{"stage": 3, "hpz": 2}], micro_batch=2))[0]
    wide = sum(k.payload * n for k, n in step.found.items() if k.op == "all_gather" and k.ranks == 4)
    near = sum(k.payload * n for k, n in step.found.items() if k.op == "all_gather" and k.ranks == 2)
    assert wide == pytest.approx(step.psi, rel=0.01)
    assert near == pytest.approx(7 * step.psi, rel=0.1)


# --- dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradients_are_communicated_in_the_dtype_that_was_asked_for(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    """Under autocast DeepSpeed goes by the kind of layer and not by its key communication_data_type, but at stage 0."""
    grads = {0: "all_reduce", 2: "reduce", 3: "reduce_scatter"}
    choices = [{"stage": s, "communication": c} for s in grads for c in ("auto", "fp32", "bf16")]
    shares = {}
    for precision in ("fp32", "bf16"):
        runs = runs_of(digits, tmp_path / precision, 2, choices, precision=precision)
        for zero, step in zip(choices, ranks.run(2, steps, runs)[0], strict=True):
            op = grads[zero["stage"]]
            numbers = 2 * step.bytes_of(op, torch.bfloat16)  # as if in fp32
            shares[precision, zero["stage"], zero["communication"]] = numbers / step.psi
            gathered = step.bytes_of("all_gather", torch.bfloat16)
            narrow = zero["stage"] == 3 and precision == "bf16" and zero["communication"] != "fp32"
            assert bool(gathered) == narrow, (precision, zero)
    for (precision, stage, communication), share in shares.items():
        if communication == "fp32" or (communication == "auto" and (precision == "fp32" or stage == 0)):
            assert share == 0, (precision, stage, communication)
        elif precision == "fp32" or stage == 0:
            assert share == pytest.approx(1, abs=0.01), (precision, stage, communication)
        else:  # plain linear layers; the modulation's and the output's are fp32 on purpose
            assert 0.5 < share < 0.95, (precision, stage, communication)
