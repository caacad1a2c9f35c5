"""Protocol hashes."""

import pytest

from dit.evals.protocol import protocol_hash


def test_order_of_keys_does_not_count_and_every_value_does():
    first = protocol_hash({"a": 1, "b": {"c": [1, 2]}})
    assert first == protocol_hash({"b": {"c": [1, 2]}, "a": 1})
    assert (
        len({first, protocol_hash({"a": 2, "b": {"c": [1, 2]}}), protocol_hash({"a": 1, "b": {"c": [2, 1]}})})
        == 3
    )


def test_what_json_cannot_say_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        protocol_hash({"a": float("nan")})
