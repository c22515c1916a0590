"""Frozen dataclasses as JSON: a round trip, and refusal of everything else."""

import json
from dataclasses import dataclass

import pytest

from shardemb import initializers, optim
from shardemb.base import serialization
from shardemb.errors import FormatError


@dataclass(frozen=True)
class Pair:
    """Refuses negative numbers."""

    a: float
    b: tuple[int, int] = (1, 2)

    def __post_init__(self):
        if self.a < 0:
            raise ValueError("a is negative")


CLASSES = {"Pair": Pair}


@pytest.mark.parametrize(
    ("what", "instance", "classes"),
    [
        ("optimizer", optim.Adam(lr=0.5, betas=(0.5, 0.75)), optim.OPTIMIZERS),
        ("optimizer", optim.SGD(), optim.OPTIMIZERS),
        ("initializer", initializers.Uniform(-1, 1, seed=2**64 - 1), initializers.INITIALIZERS),
    ],
)
def test_there_and_back_through_json(what, instance, classes):
    document = json.loads(json.dumps(serialization.to_json(instance)))
    assert document["name"] == type(instance).__name__
    assert serialization.from_json(what, classes, document) == instance


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"a": 1}, "thing None is not one of Pair"),
        ({"name": ["Pair"], "a": 1, "b": [1, 2]}, "is not one of Pair"),
        ({"name": "Triple", "a": 1}, "thing 'Triple' is not one of Pair"),
        ({"name": "Pair", "a": 1}, r"thing Pair has the fields \['a'\] instead of \['a', 'b'\]"),
        ({"name": "Pair", "a": 1, "b": [1, 2], "c": 3}, r"has the fields \['a', 'b', 'c'\]"),
        ({"name": "Pair", "a": -1, "b": [1, 2]}, "thing Pair: a is negative"),
        ({"name": "Pair", "a": "x", "b": [1, 2]}, "thing Pair: "),
    ],
)
def test_what_is_not_exactly_right_is_refused(document, words):
    with pytest.raises(FormatError, match=words):
        serialization.from_json("thing", CLASSES, document)
