"""Class accuracy: the share of images that a classifier of ImageNet takes for the class they were asked for."""

from __future__ import annotations

import numpy as np

from dit.evals.features.network import FeatureError, FeatureNetwork
from dit.evals.metrics.metric import FeatureSet
from dit.evals.pictures.pictures import Pictures, PicturesError


def class_accuracy(
    found: FeatureSet, pictures: Pictures, index: np.ndarray, network: FeatureNetwork
) -> float:
    """The share of images whose greatest logit is their label's, in [0, 1].

    Labels are matched by the names of the set's classes where these are synsets (n01440764, ...), and else are taken to
    be numbers of ImageNet's 1000 classes in the classifier's order, as DiT's are. Raises FeatureError for a network
    that does not tell them, PicturesError for labels that are none of them.
    """
    if found.logits is None or len(network.classes) != found.logits.shape[1]:
        raise FeatureError(
            f"class accuracy needs a classifier of ImageNet's 1000 classes, and {network.identity['name']} is none: "
            "take --features=efficientnet_lite0"
        )
    labels = pictures.need_labels("class accuracy")[index]
    place = {name: number for number, name in enumerate(network.classes)}
    if pictures.classes and all(name in place for name in pictures.classes):
        labels = np.array([place[name] for name in pictures.classes])[labels]
    elif pictures.classes and len(pictures.classes) != len(place):
        raise PicturesError(
            f"{pictures.named}: its {len(pictures.classes)} classes ({', '.join(pictures.classes[:3])}, ...) are not "
            "ImageNet's synsets, so that a classifier of ImageNet cannot tell them"
        )
    if labels.max() >= len(place):
        raise PicturesError(f"{pictures.named}: label {labels.max()}, and ImageNet has {len(place)} classes")
    return float((found.logits.argmax(1) == labels).mean())
