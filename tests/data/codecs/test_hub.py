"""Where a model is looked for: here, in the hub's cache, and over the network when asked, never else."""

import hashlib
import json
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest

from dit.config import ConfigError
from dit.data import DataError
from dit.data.codecs.autoencoders import CONFIG, WEIGHTS, Vae
from tests.data.helpers import tiny_vae

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a hub that does not answer."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point_at(monkeypatch, free.getsockname()[1])
    return tmp_path / "cache"


def point_at(monkeypatch, port: int) -> None:
    """Have the hub be there, as HF_ENDPOINT has it where it is set before the import."""
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def folder(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def build(path, **fields):
    return Vae(path=str(path), **fields).build()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one public model needs. root: its files. seen: what was asked."""

    root: Path
    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        files = sorted(p for p in self.root.rglob("*") if p.is_file())
        if path.startswith("/api/models/someone/vae/tree/"):
            entries = [
                {
                    "type": "file",
                    "path": str(p.relative_to(self.root)),
                    "size": p.stat().st_size,
                    "oid": "0" * 40,
                }
                for p in files
            ]
            self.answer(json.dumps(entries).encode())
        elif path.startswith("/api/models/someone/vae"):
            named = [{"rfilename": str(p.relative_to(self.root))} for p in files]
            self.answer(json.dumps({"id": "someone/vae", "sha": COMMIT, "siblings": named}).encode())
        elif path.startswith(f"/someone/vae/resolve/{COMMIT}/"):
            self.answer((self.root / path.split(COMMIT + "/")[1]).read_bytes())
        else:
            self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[type[Hub]]:
    root = tmp_path / "hub"
    tiny_vae().save_pretrained(root)
    tiny_vae(seed=1).save_pretrained(root / "inner")
    (root / "other.safetensors").write_bytes(b"0" * 1000)
    handler = type("OneHub", (Hub,), {"root": root, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    point_at(monkeypatch, server.server_port)
    yield handler
    server.shutdown()
    server.server_close()


def test_the_network_is_used_only_when_asked_for(hub, folder):
    with pytest.raises(DataError, match=r"no folder someone/vae is here.*--codec.download=true"):
        build("someone/vae")
    assert hub.seen == []
    fetched = build("someone/vae", download=True)
    assert fetched.identity() == build(folder).identity()
    assert any(WEIGHTS in line for line in hub.seen)
    assert not any("other" in line or "inner" in line for line in hub.seen)  # what is needed and no more
    hub.seen.clear()
    assert build("someone/vae").identity() == fetched.identity()  # from the cache
    assert hub.seen == []


def test_a_subfolder_on_the_hub(hub):
    with pytest.raises(
        DataError, match=rf"hf download someone/vae inner/{CONFIG} inner/{WEIGHTS} --local-dir FOLDER"
    ):
        build("someone/vae", subfolder="inner")
    inner = build("someone/vae", subfolder="inner", download=True)
    assert inner.identity()["sha256"] == build(hub.root / "inner").identity()["sha256"]


def test_what_the_hub_does_not_have(hub):
    with pytest.raises(DataError, match=r"cannot get someone/else from the Hugging Face hub \(404"):
        build("someone/else", download=True)
    (hub.root / WEIGHTS).unlink()
    with pytest.raises(
        DataError, match=rf"cannot get someone/vae from the Hugging Face hub \(it has no {WEIGHTS}\)"
    ):
        build("someone/vae", download=True)


def test_a_cache_that_holds_a_part(hub, cache):
    build("someone/vae", download=True)
    (cache / "models--someone--vae" / "snapshots" / COMMIT / WEIGHTS).unlink()
    with pytest.raises(DataError, match=r"the local cache of the Hugging Face hub does not hold it"):
        build("someone/vae")
    assert build("someone/vae", download=True).channels == 3


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize(
    "path", ["nobody/nothing", "./here", "~/there", "/no/where", "a/b/c", "runs/vae/", "vae"]
)
def test_without_a_network_it_fails_at_once(path, download):
    build_once = time.monotonic()
    with pytest.raises(DataError, match=r"hf download") as refused:
        build(path, download=download)
    assert time.monotonic() - build_once < 8  # tries again and again take 10 s and more
    hub_like = path == "nobody/nothing"
    assert ("hub" in str(refused.value).split("hf download")[0]) == hub_like
    assert (f"{CONFIG} is missing: there is no folder" in str(refused.value)) == (not hub_like)
    if hub_like:
        assert f"hf download nobody/nothing {CONFIG} {WEIGHTS} --local-dir FOLDER" in str(refused.value)


def test_a_folder_here_comes_before_a_name_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_vae(seed=2).save_pretrained("someone/vae")
    assert build("someone/vae", download=True).identity() == build(tmp_path / "someone/vae").identity()
    assert hub.seen == []


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="needs a path"):
        Vae().build()
    (folder / WEIGHTS).rename(folder / "elsewhere")
    with pytest.raises(DataError, match=rf"{WEIGHTS} is missing. .*hf download .* --local-dir {folder}"):
        build(folder)
    with pytest.raises(DataError, match="set the codec's subfolder to vae"):
        build(tmp_path)
    with pytest.raises(DataError, match=r"is a file; .*--codec=ldm"):
        build(folder / "elsewhere")


def test_a_subfolder(folder, tmp_path):
    assert build(tmp_path, subfolder="vae").identity() == build(folder).identity()
