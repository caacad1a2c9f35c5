"""Where a saved model lies: a folder here, else the local cache of the Hugging Face hub; the network when asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from dit.data import DataError
from dit.files import expand, not_found

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name


def find_folder(path: str, subfolder: str, files: Sequence[str], download: bool) -> Path:
    """Find the folder that holds `files`: path/subfolder, or that of the hub's `path` = owner/name in the local cache.

    download: fetch what the cache lacks. DataError where a file is missing, with what to do.
    """
    folder = Path(expand(path))
    if folder.is_dir() or not REPOSITORY.fullmatch(path):
        return _checked(folder, subfolder, files)
    wanted = [f"{subfolder}/{name}" if subfolder else name for name in files]
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        cached = snapshot_download(path, allow_patterns=wanted, local_files_only=not download)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise DataError(_not_found(path, wanted, download, _reason(error))) from error
    absent = [name for name in wanted if not (Path(cached) / name).is_file()]
    if absent:
        raise DataError(_not_found(path, wanted, download, f"it has no {absent[0]}"))
    return Path(cached) / subfolder


def _not_found(path: str, wanted: Sequence[str], download: bool, reason: str) -> str:
    """Why owner/name is not there, and both ways to get it."""
    fetch = f"hf download {path} {' '.join(wanted)} --local-dir FOLDER, then --codec.path=FOLDER"
    if download:
        why = reason or "it does not answer"
        return f"cannot get {path} from the Hugging Face hub ({why}); on a machine with a network: {fetch}"
    why = f" ({reason})" if reason else ""
    return (
        f"no folder {path} is here (in {Path.cwd()}, to which it is relative), and the local cache of the Hugging "
        f"Face hub does not hold it{why}. The network is used only when asked for: --codec.download=true, or {fetch}"
    )


def _reason(error: Exception) -> str:
    """What the hub or this machine said, without huggingface_hub's advice about its own options; else nothing."""
    response = getattr(error, "response", None)
    if response is not None:
        code = int(response.status_code)
        return f"{code} {HTTPStatus(code).phrase}" if code in set(HTTPStatus) else str(code)
    return getattr(error, "strerror", None) or ""


def _checked(folder: Path, subfolder: str, files: Sequence[str]) -> Path:
    if folder.is_file():
        raise DataError(
            f"{folder} is a file; expected a folder that save_pretrained wrote. Original weights of latent diffusion "
            "(.ckpt, .pt, .safetensors) are read by the codec ldm: --codec=ldm when encoding, --codec.name=ldm else"
        )
    for name in files:
        file = folder / subfolder / name
        if file.is_file():
            continue
        nested = ""
        if not folder.is_dir():
            nested = f": there is no folder {folder}"
        elif (folder / subfolder / "vae").is_dir():
            nested = "; it has a folder vae/: set the codec's subfolder to vae"
        elif file.with_suffix(".bin").is_file():
            nested = f"; {file.with_suffix('.bin').name} is a pickle, and those are not read"
        raise DataError(
            f"{not_found(file)}{nested}. Copy it there, train one with tools/train_vae.py, or fetch one: hf download "
            f"stabilityai/sd-vae-ft-ema {' '.join(files)} --local-dir {folder / subfolder}"
        )
    return folder / subfolder
