"""What a figure is called in a feature space, and what of an evaluation's protocol it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dit.config import ConfigError, to_dict
from dit.evals.features.network import FeatureNetwork
from dit.evals.metrics import METRICS, Metric
from dit.evals.protocol import protocol_hash

# Only what is computed with the original Inception weights has these names.
OF_INCEPTION = {"frechet": "fid", "frechet_spatial": "sfid"}
OF_OTHERS = {"inception_score": "logits_score"}
OWN = {shown: name for name, shown in (OF_INCEPTION | OF_OTHERS).items()}  # what metrics call these figures
ACCURACY = "class_accuracy"
FLOOR = "_held_out"  # ends the names of figures that are of real images, and of no samples
RATIO = "_ratio"  # ends that of the samples' figure divided by it
PARTS = ("features", "samples", "reference")  # of every protocol
# Figures of which more is better; of all others less is.
HIGHER_IS_BETTER = (
    "precision",
    "recall",
    "density",
    "coverage",
    "inception_score",
    "logits_score",
    "class_accuracy",
    "held-out accuracy",
    "held-out psnr",
    "held-out ssim",
)


def names_in(network: FeatureNetwork) -> Mapping[str, str]:
    """What figures are called in a network's space, where that is not what they are called of given features."""
    return OF_INCEPTION if network.identity["name"] == "inception" else OF_OTHERS


def own_names(wanted: str, kinds: list[str]) -> str:
    """Names with commas between them, as metrics call their figures, of names that figures have in spaces `kinds`.

    ConfigError for a name that a figure cannot have there.
    """
    words = [word.strip() for word in wanted.split(",")]
    for word in set(words) & set(OF_INCEPTION.values()):
        if other := [kind for kind in kinds if kind != "inception"]:
            raise ConfigError(
                f"--metrics: {word} is computed with Inception's features alone; in {other[0]} there is {OWN[word]}"
            )
    return ",".join(OWN.get(word, word) for word in words)


def protocol_of(figure: str, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What one figure depends on of the protocol of an evaluation in one feature space: JSON values.

    Options of other figures are no part of it, nor held-out images that others are compared with, nor what the figure
    does not look at of the reference. Of plain figures it is the same for all that look at the features.
    """
    if not {*PARTS} <= {*protocol}:  # nobody says what of it counts
        return dict(protocol)
    name, end = next(
        ((figure.removesuffix(e), e) for e in (FLOOR, RATIO) if figure.endswith(e)), (figure, "")
    )
    own = OWN.get(name, name)
    kind = next((kind for kind, metric in METRICS.items() if own in metric.figures), "")
    if not kind and own != ACCURACY:  # of another version
        return dict(protocol)
    kept = {key: value for key, value in protocol.items() if key not in ("held_out", "metrics")}
    kept["metrics"] = _options(own, kind, protocol.get("metrics", {})) if kind else {}
    if end:
        kept["held_out"] = protocol.get("held_out")
    if end == FLOOR:
        del kept["samples"]
    if not kind or not METRICS[kind].looks_at_reference:
        return _alone(kept)
    return kept | {"reference": _seen(METRICS[kind], protocol["reference"])}


def hash_of(figure: str, row: Mapping[str, Any]) -> str:
    """The hash of what a figure of a row depends on, whichever version wrote the row.

    row: with its protocol and the hash of that, as `InSpace.as_json` gives it.
    """
    protocol = row.get("protocol")
    if not isinstance(protocol, Mapping) or not {*PARTS} <= {*protocol}:
        return str(row["hash"])
    return protocol_hash(protocol_of(figure, protocol))


def _options(figure: str, kind: str, held: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a figure's metric that it depends on and that are not the defaults."""
    metric, values = METRICS[kind], held.get(kind, {})
    usual = to_dict(metric())
    other = {key: value for key, value in values.items() if key != "name" and value != usual.get(key)}
    own = {key: value for key, value in other.items() if figure in metric.decides.get(key, (figure,))}
    return {kind: own} if own else {}


def _alone(kept: dict[str, Any]) -> dict[str, Any]:
    """Without the reference: also of given features, where counts of both sets stand together."""
    samples = {key: value for key, value in kept["samples"].items() if key != "reference"}
    own = {key: value for key, value in kept.items() if key not in ("reference", "dimensions")}
    return own | {"samples": samples}


def _seen(metric: type[Metric], reference: Any) -> Any:
    """What a metric looks at of a reference that has images and, as ADM's files, statistics beside them."""
    if not isinstance(reference, Mapping) or "statistics" not in reference or len(reference) == 1:
        return reference
    if not metric.takes_statistics:
        return {key: value for key, value in reference.items() if key != "statistics"}
    if metric.needs == "features":
        return {"statistics": reference["statistics"]}
    return reference  # spatial ones need not be among the statistics
