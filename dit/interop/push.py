"""Models that were given out, to the Hugging Face hub, when that is asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dit.data.codecs.hub import REPOSITORY
from dit.errors import UserError

LOCAL = ["*.partial"]  # what of a folder was not finished


class PushError(UserError):
    """A model that did not reach the hub."""


def check_name(name: str) -> None:
    """PushError for what is no owner/name; before anything is written."""
    if not re.fullmatch(REPOSITORY, name):
        raise PushError(f"--push={name}: expected owner/name, as the hub names repositories")


def push(name: str, paths: Sequence[Path]) -> str:
    """Upload a folder, or files, to the repository owner/name, made where it is not there yet: its address.

    A file that ends in .md is its README.md. The token is huggingface_hub's: `hf auth login`, or HF_TOKEN. Raises
    PushError without a token, a network or the right to write.
    """
    check_name(name)
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise PushError(
            f"cannot push to {name}: no token of the Hugging Face hub is here; `hf auth login` asks for one, or set "
            "HF_TOKEN. What was written lies here all the same"
        )
    failures: tuple[type[BaseException], ...] = (
        HfHubHTTPError,
        *HfHubHTTPError.__bases__,
    )  # and its client's own
    api = HfApi()
    try:
        address = str(api.create_repo(name, exist_ok=True))
        for path in paths:
            if path.is_dir():
                api.upload_folder(repo_id=name, folder_path=path, ignore_patterns=LOCAL)
            else:
                held = "README.md" if path.suffix == ".md" else path.name
                api.upload_file(repo_id=name, path_or_fileobj=path, path_in_repo=held)
    except failures as error:
        raise PushError(
            f"cannot push to {name} ({type(error).__name__}: {' '.join(str(error).split())[:200]}). What was written "
            "lies here all the same; start the command again to push it"
        ) from error
    return address
