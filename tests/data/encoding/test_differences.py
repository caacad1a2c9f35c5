"""What differs between two encodes, as their user would say it."""

import pytest

from dit.data.encoding.differences import differences, is_of_images, shown

CODEC = {"name": "vae", "sha256": "ab" * 32, "config": {"factor": 8, "path": "a"}}
PLAN = {
    "options": {"image_size": 32, "flip": True, "crop": "centre", "posterior": "moments"},
    "codec": CODEC,
    "images": {"count": 10, "names": "aa", "labels": "bb"},
}


def changed(**sections):
    return {**PLAN, **{name: {**PLAN[name], **values} for name, values in sections.items()}}


@pytest.mark.parametrize(
    ("there", "lines"),
    [
        (PLAN, []),
        (changed(options={"image_size": 64}), ["image_size: 64 there, 32 here"]),
        (changed(options={"flip": False}), ["flip: false there, true here"]),
        (
            changed(codec={"name": "pixels", "sha256": "cd" * 32}),
            ["another codec: 'pixels' there, 'vae' here"],
        ),
        (changed(codec={"sha256": "cd" * 32}), ["another codec, its weights: cdcdcdcd there, abababab here"]),
        (
            changed(codec={"config": {"factor": 4, "path": "a"}, "sha256": "cd" * 32}),
            ["another codec, its factor: 4 there, 8 here"],
        ),
        (changed(images={"count": 9, "names": "cc", "labels": "dd"}), ["other images: 9 there, 10 here"]),
        (changed(images={"names": "cc", "labels": "dd"}), ["other images: as many, with other names"]),
        (changed(images={"labels": "dd"}), ["other labels of the same images"]),
    ],
)
def test_causes_and_not_what_follows_from_them(there, lines):
    assert differences(there, PLAN) == lines
    assert is_of_images(lines) == (bool(lines) and "images" in lines[0])


def test_of_the_manifest_in_the_words_of_the_command():
    there = {"views": ["original"], "transform": "adm centre 32", "samples": 10, "shape": [1, 3, 32, 32]}
    here = {
        "views": ["original", "flipped"],
        "transform": "adm centre 64",
        "samples": 20,
        "shape": [2, 3, 64, 64],
    }
    assert differences(there, here) == [
        "flip: false there, true here",
        "crop, exif, icc or background: 'adm centre 32' there, 'adm centre 64' here",
    ]
    assert differences({"samples": 10}, {"samples": 9}) == [
        "samples: 10 there, 9 here"
    ]  # where nothing explains it


def test_long_values_are_shown_where_they_differ():
    (line,) = differences({"seed": "x" * 100 + "y"}, {"seed": "x" * 100 + "z"})
    assert line == "seed: ...xxxxxxxxy' there, ...xxxxxxxxz' here"


def test_no_more_than_a_few():
    lines = [f"{i}: 1 there, 2 here" for i in range(10)]
    assert shown(lines).endswith("7: 1 there, 2 here; and 2 more")


@pytest.mark.parametrize("there", [None, [], "text", 3])
def test_what_is_no_plan_differs(there):
    assert differences(there, PLAN)
