"""The page in a real browser: what is clicked is drawn, by several visitors at once, and nothing else is given away."""

from __future__ import annotations

import io
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit.experiments.loaded import TrainedModel, load
from dit.sample.generate import image_grid
from dit.serving.server import Serving, serving
from dit.serving.setting import Limits
from tests.browser import Browser, Tab, browsing, chromium
from tests.datasets import Digits
from tests.train.runs import random_run

pytest.importorskip("gradio", reason="Gradio is not installed (the extra demo)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of Gradio's own packages; averages of so few steps
]
needs_browser = pytest.mark.skipif(chromium() is None, reason="no chromium here")


@dataclass(frozen=True)
class Site:
    run: Path
    model: TrainedModel
    page: Serving


@pytest.fixture(scope="module")
def site(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    run = random_run(digits, tmp_path_factory.mktemp("run"))
    model = load(run)
    with serving(model, Limits(max_images=8, max_steps=40, frames=5)) as page:
        thread = threading.Thread(target=page.run)
        thread.start()
        yield Site(run, model, page)
        page.stop()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as made:
        yield made


def opened(browser: Browser, site: Site) -> Tab:
    """The page, ready to be clicked."""
    tab = browser.tab(site.page.url)
    tab.wait("!!document.querySelector('#draw') && !document.querySelector('.translucent')", patience=120)
    tab.wait_for("Network.requestWillBeSent", lambda asked: "/heartbeat/" in asked["request"]["url"])
    return tab


def fill(tab: Tab, side: str = "A", **fields: object) -> None:
    for name, value in fields.items():
        tab.type(f"#{name}-{side} input", str(value))


def said(side: str) -> str:
    return f"(document.querySelector('#about-{side} textarea') || {{}}).value"


def picture(tab: Tab, side: str = "A") -> np.ndarray:
    """The pixels of the images that are shown."""
    source = tab.wait(f"(document.querySelector('#picture-{side} img') || {{}}).src")
    return np.asarray(Image.open(io.BytesIO(tab.bytes_of(source))).convert("RGB"))


def drawn(site: Site, images: int, **how: object) -> np.ndarray:
    made = site.model.sample(images, batch_size=images, progress=False, **how)
    return image_grid(made, images)


@needs_browser
def test_what_is_asked_for_is_drawn_and_two_settings_stand_side_by_side(site: Site, browser: Browser) -> None:
    tab = opened(browser, site)
    assert not tab.run("!!document.querySelector('#controls-B')?.offsetParent")
    tab.click("#compare input")
    tab.wait("!!document.querySelector('#steps-B input')?.offsetParent")
    tab.click("#classes-A input")
    tab.click(f"#classes-A li[aria-label={json.dumps(site.model.classes[3])}]")
    fill(tab, images=2, steps=4, scale=2, interval_from=0.2, seed=7)
    fill(tab, "B", images=3, steps=3)
    tab.click("#draw")
    tab.wait(said("A"))
    assert "--classes=3 " in tab.run(said("A"))
    tab.wait(said("B"))
    guided = {"name": "cfg", "scale": 2, "interval": [0.2, 1.0]}
    first = drawn(site, 2, classes=3, num_steps=4, seed=7, guidance=guided)
    np.testing.assert_array_equal(picture(tab), first)
    np.testing.assert_array_equal(picture(tab, "B"), drawn(site, 3, num_steps=3))
    texts = {"100": "t = 0.000", "0": "t = 1.000", "50": "t = 0.500"}
    for place, text in texts.items():
        tab.type("#place input[type=number]", place)
        tab.wait(f"document.querySelector('#way-A').innerText.includes('{text}')")
    tab.wait("document.querySelector('#way-B').innerText.includes('t = 0.333')")
    asked = {urllib.parse.urlsplit(e["request"]["url"]) for e in tab.events("Network.requestWillBeSent")}
    assert {url.netloc for url in asked if url.scheme != "data"} == {
        urllib.parse.urlsplit(site.page.url).netloc
    }
    assert [e for e in tab.events("Network.responseReceived") if e["response"]["status"] >= 400] == []
    assert tab.events("Runtime.exceptionThrown") == []


@needs_browser
def test_several_visitors_at_once_get_their_own_pictures(site: Site, browser: Browser) -> None:
    tabs = [opened(browser, site) for _ in range(3)]
    for seed, tab in enumerate(tabs):
        fill(tab, images=2, steps=20, seed=seed)
    for tab in tabs:
        tab.click("#draw")
    for seed, tab in enumerate(tabs):
        tab.wait(said("A"))
        np.testing.assert_array_equal(picture(tab), drawn(site, 2, num_steps=20, seed=seed))


@needs_browser
def test_bad_input_is_a_message_on_the_page(site: Site, browser: Browser) -> None:
    tab = opened(browser, site)
    for fields, text in (
        ({"steps": 2, "images": 2, "seed": -1}, "seed: "),
        ({"seed": 0, "interval_from": 0.8, "interval_to": 0.3}, "interval: expected times from < to"),
        ({"interval_from": 0, "interval_to": 1, "steps": 100000}, "steps: at most 40 here, got 100000"),
        ({"steps": 2, "images": 9}, "images: at most 8 here, got 9"),
        ({"images": 2, "scale": ""}, "scale: "),
        ({"scale": "1e400"}, "scale: "),
    ):
        fill(tab, **fields)
        tab.click("#draw")
        tab.wait(said("A"), lambda value, text=text: value.startswith(f"not drawn: {text}"))
        assert tab.run("document.querySelector('#picture-A img')") is None
    fill(tab, scale=1)
    tab.click("#draw")
    tab.wait(said("A"), lambda value: value.startswith("python"))
    np.testing.assert_array_equal(picture(tab), drawn(site, 2, num_steps=2))


def status(url: str, data: bytes | None = None) -> int:
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    "path",
    [
        "file=/etc/passwd",
        "file={run}/config.yaml",
        "file=%2Fetc%2Fpasswd",
        "file=..%2F..%2Fetc/passwd",
        "file=http://127.0.0.1:9/x.png",
        "proxy=http://127.0.0.1:9/",
        "runs",
    ],
)
def test_no_file_but_its_own_pictures_is_served(site: Site, path: str) -> None:
    assert (site.run / "config.yaml").is_file()
    assert status(f"{site.page.url}gradio_api/{path.format(run=site.run)}") == 404
    assert status(f"{site.page.url}{path.format(run=site.run)}") == 404


def test_nobody_gets_past_the_queue_or_uploads(site: Site) -> None:
    config = json.load(urllib.request.urlopen(f"{site.page.url}config", timeout=30))
    for number, event in enumerate(config["dependencies"]):
        body = json.dumps({"fn_index": number, "data": [], "session_hash": "abc"}).encode()
        queued = event["queue"] is not False
        answered = status(f"{site.page.url}gradio_api/run/predict", body)
        assert answered in ((404, 403) if queued else (200, 422, 500)), (number, answered)
    assert status(f"{site.page.url}gradio_api/upload", b"{}") == 404
    assert status(f"{site.page.url}gradio_api/queue/join", b" " * 70000) == 413
