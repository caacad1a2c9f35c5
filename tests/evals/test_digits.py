"""The judge of generated digits, on real ones."""

import numpy as np
import pytest

from dit.data.sources.images import open_source
from dit.evals.digits import DigitsJudge, LabelledImages


def real(split):
    source = open_source(f"digits:{split}")
    images = np.stack([source.load(i, 32) for i in range(len(source))])
    return LabelledImages(images, np.asarray(source.labels))


@pytest.fixture(scope="module")
def judged():
    train, held_out = real("train"), real("test")
    return DigitsJudge(train, held_out), train, held_out


def test_real_digits_are_judged_real(judged):
    judge, train, _ = judged
    assert judge.held_out_accuracy > 0.97
    assert judge.accuracy(train) > judge.held_out_accuracy
    assert judge.frechet(train.images) == pytest.approx(0.0, abs=1e-9)
    assert 0.5 < judge.frechet_floor < 5


def test_wrong_labels_wrong_images_and_missing_classes_are_noticed(judged):
    judge, _, held_out = judged
    assert judge.accuracy(LabelledImages(held_out.images, (held_out.labels + 1) % 10)) < 0.05
    assert judge.frechet(255 - held_out.images) > 20 * judge.frechet_floor
    assert judge.frechet(held_out.images[held_out.labels < 5]) > 2 * judge.frechet_floor


def test_the_report_names_every_figure_with_its_reference(judged):
    judge, _, held_out = judged
    report = judge.report(held_out, held_out)
    assert report["class_accuracy"] == report["class_accuracy_held_out_real"] == judge.held_out_accuracy
    assert report["frechet"] == pytest.approx(report["frechet_floor"])
    assert report["samples"] == len(held_out.images)
    assert len(report["protocol"]) == 12
