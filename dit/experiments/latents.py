"""What the latents of a run are, which travels with every checkpoint, whether two runs' are the same, their codec."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from dit.config import ConfigError, config, to_dict
from dit.data import DataError
from dit.data.codecs.base import Codec, CodecConfig
from dit.data.codecs.codec import CODECS, Pixels, check_same_codec
from dit.data.codecs.norm import LatentNorm
from dit.data.shards.manifest import Manifest
from dit.data.storage.remote import public
from dit.errors import UserError, shown
from dit.flow.couple import COUPLINGS, Coupling
from dit.flow.path import NoisePath
from dit.ranks.group import World

SHOWN = 8  # entries of a list in a message


@config
class LatentsConfig:
    """How stored latents become what the model sees."""

    norm: Literal["dataset", "codec"] = (
        "dataset"  # the data's mean and std, or the codec's own scale (official DiT)
    )


def latent_contract(manifest: Manifest, norm: LatentNorm) -> dict[str, Any]:
    """JSON values: what sampling from a model of these latents must know of them."""
    return {
        "norm": to_dict(norm),
        "codec": manifest.codec,
        "shape": [manifest.channels, *manifest.input_size],
        "image_size": manifest.image_size,
        "classes": list(manifest.classes),
    }


def check_same_latents(ours: Mapping[str, Any], theirs: Mapping[str, Any], named: str, other: str) -> None:
    """DataError unless two contracts are of the same latents and classes. named, other: whose they are."""
    check_same_codec(ours["codec"], theirs["codec"], named, other)
    for key in ("shape", "classes", "norm"):
        if ours[key] != theirs[key]:
            raise DataError(
                f"{named} and {other} differ in the {key} of their latents ({_against(ours[key], theirs[key])}); "
                "take a run trained on the same data"
            )


def check_same_data(contract: Mapping[str, Any], manifest: Manifest, named: str, data: str) -> None:
    """DataError unless data are like those that a model was trained on. named, data: the model and they, in words."""
    check_same_codec(contract["codec"], manifest.codec, named, data)
    found = {"shape": [manifest.channels, *manifest.input_size], "classes": list(manifest.classes)}
    for name, value in found.items():
        if contract[name] != value:
            raise DataError(
                f"{data} and {named} differ in {name}: {_against(value, contract[name])}; encode the data as those of "
                "the run were"
            )


def _against(ours: Any, theirs: Any) -> str:
    """Two values that differ, in words: of lists that are too long to be shown how many, and the first difference."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        key = next(key for key in (*ours, *theirs) if ours.get(key) != theirs.get(key))
        return f"{key}: {_against(ours.get(key), theirs.get(key))}"
    is_long = isinstance(ours, list) and isinstance(theirs, list) and max(len(ours), len(theirs)) > SHOWN
    if not is_long:
        return f"{shown(ours)} against {shown(theirs)}"
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    at = min(len(ours), len(theirs)) if place is None else place
    first, second = (shown(held[at]) if at < len(held) else "nothing" for held in (ours, theirs))
    return f"{len(ours)} against {len(theirs)}, first number {at}: {first} against {second}"


def check_same_path(ours: NoisePath, theirs: NoisePath, named: str, other: str) -> None:
    """ConfigError unless x at every time is the same mixture of data and eps on both."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for a, b in zip(ours.alpha_sigma(t), theirs.alpha_sigma(t), strict=True):
        if not torch.allclose(a, b, rtol=1e-6, atol=1e-9):
            raise ConfigError(
                f"{named} was trained on path {ours} and {other} on {theirs}: the same x is not as noisy on both; "
                "take a run trained on the same path"
            )


def check_noise(coupling: Coupling, manifest: Manifest, held_out: str | None) -> None:
    """ConfigError where a coupling takes stored noise and the data, or the held-out data at a path, store none."""
    if not coupling.stored:
        return
    data = {"data.path": manifest} | ({} if held_out is None else {"data.val": Manifest.load(held_out)})
    for key, stored in data.items():
        if not stored.eps:
            raise ConfigError(
                f"objective.coupling {COUPLINGS.name_of(coupling)} takes the noise that is stored with each sample, "
                f"and {public(stored.root)} stores none; make pairs with tools/sample.py RUN --save_pairs=DIR and set "
                f"{key}=DIR{' (or null)' if key == 'data.val' else ''}"
            )


def open_codec(
    choice: CodecConfig | None, identity: dict[str, Any], named: str, device: torch.device
) -> Codec:
    """The codec that made the data, to decode with. identity: of the data's codec, which `named` records.

    Pixels need no codec, whatever is set. ConfigError where it is not said where to find another one; DataError
    where it cannot be loaded or is not the one.
    """
    if identity["name"] == "pixels":
        return Pixels().build(device)
    if choice is None:
        raise ConfigError(
            f"the data's codec is '{identity['name']}' and nothing says where it is: set codec: {{name: "
            f"{identity['name']}, path: FOLDER}} (or --codec.path=FOLDER when sampling)"
        )
    try:
        codec = choice.build(device)
    except DataError as error:
        raise DataError(
            f"{error}. {named} needs the codec '{identity['name']}' that its data were made with: --codec.path=FOLDER"
        ) from None
    if "sha256" in identity:
        check_same_codec(identity, codec.identity(), named, "the codec given")
    else:
        _check_unknown_codec(identity, codec, named)
    return codec


def codec_doubts(
    choice: CodecConfig | None, identity: Mapping[str, Any], named: str, reads: bool
) -> tuple[str, ...]:
    """How the codec that is configured contradicts that of the data, in a sentence; () where it does not.

    identity: of the data's codec, which `named` records. reads: look at the weights too, if they lie here; not where
    they are opened anyway. A codec that nothing draws with may be somewhere else.
    """
    if choice is None:
        return ()
    kind, held = CODECS.name_of(choice), str(identity["name"])
    if (kind == "pixels") != (held == "pixels"):
        right = "codec: null" if held == "pixels" else f"codec: {{name: {held}, path: FOLDER}}"
        return (
            f"codec is '{kind}', and the data in {named} are of codec '{held}': a model of them is trained "
            f"on what they hold. Take data that were encoded with {kind}, or set {right}.",
        )
    if not reads or "sha256" not in identity or not Path(str(getattr(choice, "path", None))).exists():
        return ()
    try:
        found = choice.build("cpu").identity()
    except UserError:  # it contradicts nothing yet; what needs it says what is wrong with it
        return ()
    try:
        check_same_codec(identity, found, named, "the codec that is configured")
    except DataError as error:
        return (f"{error}.",)
    return ()


def _check_unknown_codec(identity: dict[str, Any], codec: Codec, named: str) -> None:
    """Take any VAE of the right channels where weights from elsewhere do not say which one it was."""
    channels = identity["config"]["latent_channels"]
    if codec.identity()["name"] != identity["name"] or codec.channels != channels:
        raise DataError(
            f"{named} needs a codec '{identity['name']}' of {channels} channels; the codec given is "
            f"'{codec.identity()['name']}' and has {codec.channels}"
        )
    if World.from_env().is_main:
        print(f"note: {named} does not say which {identity['name']} it goes with; taking the codec given")
