"""What a run needs of its machines, looked at before it starts: what is wrong is said in seconds, with the node's name.

CHECKS is one list for three: `check` is called by every start and every dry run, and `check_and_print` is all that
`--preflight` does. Those of the configuration and its data are in fits.py.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as td

from dit.data.shards.blocks import BlockError
from dit.data.shards.manifest import Manifest
from dit.data.shards.readers import open_reader
from dit.errors import UserError
from dit.ranks import group
from dit.ranks.join import patience, ranks_text
from dit.train.plan import MakeParts, Plan
from dit.train.preflight import fits
from dit.train.preflight.nodes import PreflightError, Site, existing, open_site
from dit.train.settings import RunConfig
from dit.version import code_version

SUMMED = 1 << 18  # numbers that the all-reduce adds up, 8 bytes each
NFS_PATIENCE = 10.0  # seconds until a file that one node wrote must be seen by another


# --- the checks: each is collective, returns what it found, and raises the same on every rank ----------------


def batch(site: Site) -> str:
    """The global batch can be shared by the ranks. ConfigError where not."""
    return site.cfg.train.shared_out(site.world)


def versions(site: Site) -> str:
    """The same software on all nodes."""
    by_node = site.on_nodes(_versions)
    (first, expected), *others = by_node.items()
    wrong = [
        f"{name} is {theirs[name]} on {site.named(node)} and {ours} on {site.named(first)}"
        for node, theirs in others
        for name, ours in expected.items()
        if theirs[name] != ours
    ]
    if wrong:
        raise PreflightError(
            f"{'; '.join(wrong)}. Install the same on all nodes, or one environment on a file system they share"
        )
    return f"{', '.join(f'{k} {v}' for k, v in expected.items())} on {len(by_node)} node(s)"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("deepspeed", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return {**found, "dit": code_version().removesuffix("+")}  # a file may change while nodes start


def devices(site: Site) -> str:
    """No GPU is two ranks'."""
    device, own = site.world.device, ("", "CPU", 0)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        own = (str(properties.uuid), properties.name, torch.cuda.device_count())
    found = group.gather_objects(own, site.group)
    shared = several_on_one(found, site.nodes)
    if shared:
        raise PreflightError(
            f"several ranks share one GPU: {'; '.join(shared)}. Start one rank a GPU: --ntasks-per-node and "
            "--gpus-per-node the same number (NPROC with launch/local.sh)"
        )
    names = [name for _, name, _ in found]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def several_on_one(found: Sequence[tuple[str, str, int]], nodes: Sequence[str]) -> list[str]:
    """The ranks that have the same GPU, a text for each. found: (uuid or "", name, GPUs on the node) of each rank."""
    ranks_of: dict[str, list[int]] = {}
    for rank, (identity, _, _) in enumerate(found):
        if identity:
            ranks_of.setdefault(identity, []).append(rank)
    return [
        f"{ranks_text(ranks)} on {nodes[ranks[0]]}, where ranks see {found[ranks[0]][2]} GPU(s)"
        for ranks in ranks_of.values()
        if len(ranks) > 1
    ]


def all_reduce(site: Site) -> str:
    """Numbers are added up over all ranks, by the backend that the run uses, in a set time."""
    if site.world.size == 1:
        return "one rank"
    seconds = [0.0, 0.0]

    def add_up() -> None:
        for i in range(len(seconds)):
            began = time.perf_counter()
            numbers = torch.full((SUMMED,), site.world.rank + 1, dtype=torch.int64, device=site.world.device)
            td.all_reduce(numbers, async_op=True).wait(timedelta(seconds=patience()))
            wrong = int((numbers != site.world.size * (site.world.size + 1) // 2).sum())
            seconds[i] = time.perf_counter() - began
            if wrong:
                raise PreflightError(
                    f"{wrong} of {SUMMED} sums of an all-reduce over {td.get_backend()} are wrong; do not train on "
                    "this hardware (NCCL_DEBUG=INFO shows what NCCL uses)"
                )

    def add_up_in_time() -> None:
        try:
            add_up()
        except RuntimeError as error:
            first = str(error).split("\n", 1)[0]
            raise PreflightError(
                f"the first all-reduce over {td.get_backend()} failed or took longer than {patience():g} s ({first}): "
                "see the network between the nodes (NCCL_DEBUG=INFO; NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME)"
            ) from error

    site.on_ranks(add_up_in_time)
    return (
        f"{td.get_backend()}, {site.world.size} rank(s): {SUMMED * 8 / 2**20:g} MiB in {seconds[1] * 1000:.1f} ms "
        f"(the first time {seconds[0] * 1000:.1f} ms)"
    )


def run_dir(site: Site) -> str:
    """All nodes can write where the run directory is or will be, and see the same files there."""
    run = site.cfg.folder.absolute()
    proposed = existing(run), f".dit-preflight-{secrets.token_hex(8)}"
    folder, token = group.gather_objects(proposed, site.group)[0]  # as rank 0 sees it
    mine = folder / f"{token}-{site.world.rank}"

    def write() -> None:
        there = next(f for f in (run, *run.parents) if os.path.lexists(f))
        if not there.is_dir():
            raise PreflightError(f"{there} is no directory; choose another run_dir than {site.cfg.run_dir}")
        try:
            mine.write_text(token, encoding="utf-8")
        except OSError as error:
            raise PreflightError(
                f"cannot write into {folder} ({error.strerror}); run_dir={site.cfg.run_dir} must be on a file system "
                "that all nodes share, where you may write"
            ) from None

    def read() -> None:
        end = time.monotonic() + NFS_PATIENCE
        while not _holds(folder / f"{token}-0", token):
            if time.monotonic() > end:
                raise PreflightError(
                    f"a file that {site.nodes[0]} wrote into {folder} is not seen; run_dir={site.cfg.run_dir} must be "
                    "on a file system that all nodes share"
                )
            time.sleep(0.1)

    try:
        site.on_nodes(write)
        nodes = site.on_nodes(read)
        return f"{folder} is written and seen by {len(nodes)} node(s)"
    finally:
        if site.leads:
            with contextlib.suppress(OSError):  # where it could not be written
                mine.unlink()


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_bytes() == text.encode()
    except OSError:
        return False


def data(site: Site) -> str:
    """Each node reads the same manifests, and a block. DataError where none can; PreflightError where some cannot."""
    by_node = site.on_nodes(lambda: _read_data(site.cfg))
    (first, expected), *others = by_node.items()
    for node, theirs in others:
        if theirs != expected:
            raise PreflightError(
                f"{site.cfg.data.name} is another data set on {site.named(node)} ({_short(theirs)}) than on "
                f"{site.named(first)} ({_short(expected)}): copy it again, or use a file system that all nodes share"
            )
    return f"{site.cfg.data.name}: {_short(expected)} and a block read on {len(by_node)} node(s)"


def _short(digests: tuple[str, ...]) -> str:
    return "manifest " + " + ".join(digest[:12] for digest in digests)


def _read_data(cfg: RunConfig) -> tuple[str, ...]:
    """The digests of the data sets, after a block of each was read."""
    manifests = [manifest for manifest, _ in cfg.data.open().parts]
    for manifest in manifests:
        _read_a_block(manifest, cfg.data.max_quarantined)
    held_out = [Manifest.load(cfg.data.val)] if cfg.val.every and cfg.data.val else []
    return tuple(manifest.digest for manifest in [*manifests, *held_out])


def _read_a_block(manifest: Manifest, budget: int) -> None:
    """One block, or the next where the run may leave out blocks that are broken."""
    reader = open_reader(manifest)
    for block in range(len(manifest.blocks)):
        try:
            reader.read(block)
            return
        except BlockError:
            if block >= min(budget, len(manifest.blocks) - 1):
                raise


Checks = dict[str, Callable[[Site], str]]
MACHINES: Checks = {
    "batch": batch,
    "versions": versions,
    "devices": devices,
    "all-reduce": all_reduce,
    "run_dir": run_dir,
    "data": data,
}
FITS: Checks = {
    "config": fits.config,
    "order": fits.order,
    "model": fits.model,
    "past": fits.past,
    "branch": fits.branch,
    "init": fits.init,
    "sharding": fits.sharding,
    "space": fits.room,
}
CHECKS: Checks = {**MACHINES, **FITS}


def check(plan: Plan, chosen: Checks = CHECKS) -> None:
    """Run checks; the first that fails raises on every rank. Collective. A start and a dry run call it with all."""
    with open_site(plan) as site:
        for run in chosen.values():
            run(site)


def check_and_print(cfg: RunConfig, make_parts: MakeParts) -> None:
    """Every check, a line each, also after one that failed; nothing is trained. Collective.

    Raises PreflightError with what failed. A check that meets what another one has failed at is not counted again.
    """
    failed: dict[str, str] = {}
    with group.session() as world:
        plan = Plan(cfg, make_parts, world)
        with open_site(plan) as site, contextlib.closing(plan):
            for name, run in CHECKS.items():
                try:
                    told = run(site)
                except (UserError, OSError) as error:
                    known = failed.setdefault(str(error), name)
                    told = f"FAILED: {error}" if known == name else f"not looked at, see {known}"
                if world.is_main:
                    print(f"{name:11s} {told}", flush=True)
    if failed:
        texts = [f"{name}: {text}" for text, name in failed.items()]
        raise PreflightError(f"{len(failed)} check(s) failed. " + "\n".join(texts))
