"""How good generated digits are: a classifier fitted on real ones, and a Fréchet distance in a PCA space."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import reduce
from PIL import Image
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from dit.data.codecs.autoencoders import Vae
from dit.data.sources.images import open_source
from dit.evals.features.pixels import Pca
from dit.evals.metrics.frechet import Statistics, frechet_distance
from dit.evals.protocol import protocol_hash
from dit.sample.generate import image_grid, to_uint8

COMPONENTS = 32
CLASSIFIER = {"kernel": "rbf", "C": 10.0, "gamma": "scale"}
PROTOCOL = {
    "data": "scikit-learn digits, 1297 train / 500 held out, bicubic to 32x32",
    "features": {"pca": COMPONENTS, "fitted_on": "train", "pixels": "[0, 1]"},
    "classifier": {"svm": CLASSIFIER, "on": "4x4 block means"},
    "guided": "cfg_scale 2",
    "unguided": "cfg_scale 1",
}


@dataclass(frozen=True)
class LabelledImages:
    """images (N, H, W, 3) uint8 and their labels (N,) int64."""

    images: np.ndarray
    labels: np.ndarray


class DigitsJudge:
    """Judges generated digits against real ones it was given; the held-out ones give every figure's reference."""

    def __init__(self, train: LabelledImages, held_out: LabelledImages):
        from sklearn.svm import SVC

        self._pca = Pca.fit(train.images, COMPONENTS)
        self._train = Statistics.fit(self._pca(train.images))
        self._classifier = SVC(**CLASSIFIER).fit(_blocks(train.images), train.labels)
        self._classes = int(train.labels.max()) + 1
        self.held_out_accuracy = self.accuracy(held_out)
        self.frechet_floor = self.frechet(held_out.images)

    def accuracy(self, samples: LabelledImages) -> float:
        """Share of images that the classifier takes for the class they were asked for."""
        found = torch.from_numpy(self._classifier.predict(_blocks(samples.images)))
        metric = MulticlassAccuracy(self._classes, average="micro")
        return float(metric(found, torch.from_numpy(samples.labels)))

    def frechet(self, images: np.ndarray) -> float:
        """Fréchet distance of images (N, H, W, 3) uint8 to the training images."""
        return frechet_distance(Statistics.fit(self._pca(images)), self._train)

    def report(self, guided: LabelledImages, unguided: LabelledImages) -> dict[str, Any]:
        """The quickstart's figures: guided = at cfg_scale 2, unguided = at cfg_scale 1."""
        return {
            "class_accuracy": self.accuracy(guided),
            "class_accuracy_cfg1": self.accuracy(unguided),
            "class_accuracy_held_out_real": self.held_out_accuracy,
            "frechet": self.frechet(unguided.images),
            "frechet_cfg2": self.frechet(guided.images),
            "frechet_floor": self.frechet_floor,
            "samples": len(guided.images),
            "protocol": protocol_hash({**PROTOCOL, "samples": [len(guided.images), len(unguided.images)]}),
        }


def _blocks(images: np.ndarray) -> np.ndarray:
    """(N, 32, 32, 3) uint8 to (N, 64) means of 4x4 blocks over channels, in [0, 1]: the digits' own resolution."""
    pixels = images.astype(np.float64) / 255
    blocks: np.ndarray = reduce(pixels, "n (h a) (w b) c -> n (h w)", "mean", a=4, b=4)
    return blocks


def judge_quickstart(folder: Path, vae: Path) -> dict[str, Any]:
    """Judge what tools/quickstart.py drew, and draw folder/grid.png, a row for each class.

    folder: holds samples_cfg2 and samples_cfg1, of tools/sample.py. vae: the autoencoder's folder. Gives the figures of
    `DigitsJudge.report`, and the autoencoder's mean squared error on held-out digits, of pixels in [0, 1].
    """
    held_out = real_digits("test")
    guided, unguided = (read_samples(folder / f"samples_cfg{scale}") for scale in (2, 1))
    report = DigitsJudge(real_digits("train"), held_out).report(guided, unguided)
    report["reconstruction_mse"] = reconstruction_mse(vae, held_out.images)
    by_class = [guided.images[guided.labels == c][:10] for c in range(10)]
    picture = Image.fromarray(image_grid(np.concatenate(by_class), columns=10))
    size = (2 * picture.width, 2 * picture.height)
    picture.resize(size, Image.Resampling.NEAREST).save(folder / "grid.png")
    return report


def real_digits(split: str) -> LabelledImages:
    """Read scikit-learn's digits, train or test, as images of 32 pixels a side."""
    source = open_source(f"digits:{split}")
    images = np.stack([source.load(i, 32) for i in range(len(source))])
    return LabelledImages(images, np.asarray(source.labels))


def read_samples(folder: Path) -> LabelledImages:
    """Read what tools/sample.py wrote into a folder."""
    with np.load(folder / "samples.npz") as held:
        return LabelledImages(held["arr_0"], held["arr_1"])


def reconstruction_mse(vae: Path, images: np.ndarray) -> float:
    """Measure the mean squared error in [0, 1] of images (N, H, W, 3) uint8 through the posterior's mean."""
    codec, metric = Vae(path=str(vae)).build(), MeanSquaredError()
    for part in np.array_split(images, max(1, len(images) // 100)):
        pixels = torch.from_numpy(part).permute(0, 3, 1, 2).float() / 127.5 - 1
        decoded = to_uint8(codec.decode(codec.encode(pixels)[:, 0]))
        metric.update(torch.from_numpy(decoded).float() / 255, torch.from_numpy(part).float() / 255)
    return float(metric.compute())
