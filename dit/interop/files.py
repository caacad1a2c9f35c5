"""Files of other projects: weights in and out, and statistics of latents."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit.config import ConfigError
from dit.data.codecs.norm import LatentNorm
from dit.errors import shown
from dit.files import expand, sync
from dit.interop.weights import StateDict, WeightsError

# What Lightning's checkpoints have before the names of trained weights and of their average, as DDT writes them
TRAINED = {"ema": "ema_denoiser.", "model": "denoiser."}


def read_weights(path: str | Path) -> dict[str, StateDict]:
    """{"ema": ..., "model": ...} from a .safetensors or a .pt file.

    The file holds a state dict, or the dictionary that the projects' training scripts save, with "ema" and "model"
    in it, or Lightning's with "state_dict"; one of them stands for both. Wrappers' prefixes (module., _orig_mod.) are
    taken off. No pickle is trusted.
    """
    path = Path(expand(str(path)))
    held = _trained(_load(path))
    states = [_bare(held[kind]) for kind in ("ema", "model") if kind in held]
    if not all(state and all(isinstance(t, Tensor) for t in state.values()) for state in states):
        raise WeightsError(f"{path} holds no state dict, nor one under 'ema', 'model' or 'state_dict'")
    return {"ema": states[0], "model": states[-1]}


def _trained(held: Any) -> dict[str, Any]:
    """What a file holds, as {"ema": ..., "model": ...} or one of them."""
    if not isinstance(held, dict) or "ema" in held or "model" in held:
        return held if isinstance(held, dict) else {"model": held}
    state = held.get("state_dict", held)
    if not isinstance(state, dict):
        return {"model": state}
    found = {
        kind: {str(k).removeprefix(start): t for k, t in state.items() if str(k).startswith(start)}
        for kind, start in TRAINED.items()
    }
    return {kind: named for kind, named in found.items() if named} or {"model": state}


def _load(path: Path) -> Any:
    """What a .safetensors or a .pt file holds. WeightsError where it cannot be read."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # of training scripts: plain values
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).split(".", 1)[0]  # torch's goes on to advise that the file be trusted
        raise WeightsError(
            f"cannot read weights from {path}: expected a .safetensors file, or a .pt of tensors as torch.save writes "
            f"it ({type(error).__name__}: {reason})"
        ) from error


def _bare(state: Any) -> dict[str, Tensor]:
    """Without what DistributedDataParallel and torch.compile put before names; empty if it is no state dict."""
    names = dict(state) if isinstance(state, dict) else {}
    for prefix in ("module.", "_orig_mod."):
        names = {str(name).removeprefix(prefix): tensor for name, tensor in names.items()}
    return names


def write_weights(path: Path, state: StateDict) -> None:
    """A state dict as .safetensors, or as a .pt that torch.load reads; whole or not at all."""
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in state.items()}
    partial = path.with_name(f".{path.name}.partial")
    write: Callable[[Any, Path], None] = save_file if path.suffix == ".safetensors" else torch.save
    write(tensors, partial)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def read_stats(path: str, channels: int) -> LatentNorm:
    """Means and standard deviations of the channels, of a file of {"mean": ..., "std": ...}, each (1, C, 1, 1) or (C,).

    WeightsError for anything else.
    """
    held = _load(Path(expand(path)))
    parts: list[Any] = [held.get(name) for name in ("mean", "std")] if isinstance(held, dict) else []
    if not parts or not all(isinstance(p, Tensor) and p.numel() == max(p.shape) == channels for p in parts):
        has = {k: tuple(getattr(v, "shape", ())) for k, v in held.items()} if isinstance(held, dict) else held
        raise WeightsError(
            f"{path}: expected 'mean' and 'std' of {channels} channels, each of shape (1, {channels}, 1, 1); it holds "
            f"{shown(has)}"
        )
    mean, std = (tuple(float(value) for value in part.flatten()) for part in parts)
    try:
        return LatentNorm(mean=mean, std=std)
    except ConfigError as error:
        raise WeightsError(f"{path}: {error}") from None
