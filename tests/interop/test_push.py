"""Pushing to a hub, as far as this machine goes: names, tokens, and a hub that does not answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit.interop.push import PushError, check_name, push


@pytest.mark.parametrize("name", ["", "name", "a/b/c", "owner/", "/tmp/x", "owner/na me"])
def test_what_is_no_name_on_the_hub_is_refused(name: str) -> None:
    with pytest.raises(PushError, match=r"expected owner/name"):
        check_name(name)
    check_name("owner/dit-digits")


def test_without_a_token_it_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(PushError, match=r"cannot push to owner/name: no token .* `hf auth login`"):
        push("owner/name", [tmp_path])


def test_a_hub_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a token, and an address where nothing listens."""
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushError, match=r"cannot push to owner/name \(.*start the command again"):
        push("owner/name", [tmp_path])
