"""What is known of the devices that a plan can be made for: memory, bandwidths, links between them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from dit.bench.speed.step import product_rate
from dit.config import ConfigError, did_you_mean
from dit.model.cost import PEAK_FLOPS

MIB = 2**20
CPU = "cpu"


@dataclass(frozen=True)
class DeviceFacts:
    """One rank's device. Bandwidths in bytes/s, times in seconds, one direction, as makers state them.

    memory: bytes. memory_rate: of its memory. node: devices in a machine. link: of a device to the others in its
    machine. network: of a device's share of the machine's network. latency, network_latency: of a message. host: to
    the host's memory. launch: of an operation, on the host. peak: FLOP/s of dense matrix products in bfloat16, of
    which MFU is a share. peak_fp32: in float32, as torch multiplies that unless TF32 is allowed.
    gemm_share, memory_share, wire_share: what of peak, memory_rate and link or network a program reaches.
    """

    name: str
    peak: float
    peak_fp32: float
    memory: int
    memory_rate: float
    node: int
    link: float
    network: float
    latency: float
    network_latency: float
    host: float
    launch: float
    gemm_share: float
    memory_share: float
    wire_share: float

    @property
    def on_host(self) -> bool:
        """Whether its memory is the host's."""
        return self.name == CPU

    def products(self, precision: str) -> float:
        """FLOP/s of dense matrix products at a precision, as makers state them."""
        return self.peak_fp32 if precision == "fp32" else self.peak

    def words(self, precision: str) -> dict[str, str]:
        """What is assumed of it, by name."""
        return {
            "peak": f"{self.products(precision) / 1e12:.4g} TFLOP/s of dense matrix products in {precision}",
            "matrix products": f"at {self.gemm_share:.0%} of the peak",
            "memory bandwidth": f"{self.memory_rate * self.memory_share / 1e12:.3g} TB/s "
            f"({self.memory_share:.0%} of {self.memory_rate / 1e12:.3g})",
            "links": f"{self.link * self.wire_share / 1e9:.3g} GB/s a rank in a machine of {self.node}, "
            f"{self.network * self.wire_share / 1e9:.3g} GB/s a rank between machines "
            f"({self.wire_share:.0%} of {self.link / 1e9:.3g} and {self.network / 1e9:.3g}), messages of "
            f"{self.latency * 1e6:.3g} and {self.network_latency * 1e6:.3g} us",
        }


def _gpu(
    name: str, peak_fp32: float, mib: int, memory_rate: float, link: float, network: float
) -> DeviceFacts:
    """A GPU in a machine of eight, joined all to all by switches, a network adapter each."""
    return DeviceFacts(
        name=name,
        peak=PEAK_FLOPS[name.upper()],
        peak_fp32=peak_fp32,
        memory=mib * MIB,
        memory_rate=memory_rate,
        node=8,
        link=link,
        network=network,
        latency=5e-6,  # of NCCL's messages over NVLink, and over InfiniBand
        network_latency=10e-6,
        host=25e9,  # PCIe 4 x16 at what pinned copies reach; 5.0 has more
        launch=6e-6,  # of an eager operation: Python, the dispatcher, the driver
        gemm_share=0.81,  # large bf16 products were seen to reach 798 TFLOP/s on an H100, 790 on an H200
        memory_share=0.9,  # large copies were seen to reach 3.0 TB/s on an H100, 4.3 on an H200
        wire_share=0.8,  # nccl-tests' bus bandwidths are 75 to 90% of the links'
    )


# memory: what nvidia-smi shows. peak_fp32 and bandwidths: NVIDIA's data sheets of the SXM modules (A100 80GB, H100,
# H200, HGX B200); NVLink's are halved to one direction. Network: a DGX's adapters, 200 Gb/s a GPU with A100s, 400 with
# the others.
GPUS: Mapping[str, DeviceFacts] = {
    facts.name: facts
    for facts in (
        _gpu("a100", 19.5e12, 81_920, 2.039e12, 300e9, 25e9),
        _gpu("h100", 67e12, 81_559, 3.35e12, 450e9, 50e9),
        _gpu("h200", 67e12, 143_771, 4.8e12, 450e9, 50e9),
        _gpu("b200", 75e12, 183_359, 8.0e12, 900e9, 50e9),
    )
}
NAMES = (*GPUS, CPU)


def device_facts(name: str, precision: str) -> DeviceFacts:
    """Look a device up; a CPU's peak is what a matrix product reaches here now. ConfigError for one that is unknown."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    if name.lower() != CPU:
        valid = f" (known: {', '.join(NAMES)})"
        raise ConfigError(f"--device: unknown device '{name}'{did_you_mean(name, NAMES)}{valid}")
    return core(product_rate(torch.device("cpu"), precision))


def core(peak: float, memory: int | None = None, cores: int | None = None) -> DeviceFacts:
    """One core of a CPU as a rank: a machine has as many as this one. peak: FLOP/s of a matrix product on it."""
    cores = cores or len(os.sched_getaffinity(0))
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceFacts(
        name=CPU,
        peak=peak,
        peak_fp32=peak,
        memory=memory or whole // cores,
        memory_rate=10e9,  # a core's share, of DDR4 and DDR5 in servers
        node=cores,
        link=2e9,  # gloo through the loopback, with its copies and sums
        network=1.25e9,  # 10 Gb/s Ethernet a rank
        latency=100e-6,
        network_latency=200e-6,
        host=10e9,
        launch=0.0,  # the operation runs in the thread that launches it
        gemm_share=0.9,
        memory_share=0.9,
        wire_share=0.8,
    )


def together(facts: DeviceFacts, ranks: int) -> DeviceFacts:
    """So many ranks in one machine, though it may have fewer cores: in CPU time that makes no difference."""
    return replace(facts, node=max(ranks, facts.node))
