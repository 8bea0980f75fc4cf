"""What a config says of a classification head: the names of its classes, and what its values are. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from batchinfer.models.files import ModelError

DEFAULT_CLASSES = 2
"""Of a config that names none, as in transformers."""

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


def labels(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The names of the classes, in the order of the head's rows. Raises ModelError."""
    named = config.get("id2label")
    if named is None:
        count = config.get("num_labels", DEFAULT_CLASSES)
        if type(count) is not int or not 0 < count < 2**20:
            raise ModelError(f"{where}: num_labels={count!r} must be a whole number above 0")
        return tuple(f"LABEL_{i}" for i in range(count))
    if not isinstance(named, dict) or not named or {str(i) for i in range(len(named))} != set(map(str, named)):
        raise ModelError(f"{where}: id2label must name the classes by their numbers, from 0 on")
    by_number = {int(number): label for number, label in named.items()}
    return tuple(str(by_number[i]) for i in range(len(by_number)))


def activation(config: Mapping[str, Any], where: str) -> Literal["", "softmax", "sigmoid"]:
    """What makes probabilities of the head's values: none of a regression, a sigmoid of labels that do not exclude each
    other and of a single one, else a softmax. Raises ModelError."""
    problem = config.get("problem_type")
    if problem is not None and problem not in PROBLEMS:
        raise ModelError(f"{where}: problem_type={problem!r} is not supported; it must be one of {', '.join(PROBLEMS)}")
    if problem == "regression":
        return ""
    return "sigmoid" if problem == "multi_label_classification" or len(labels(config, where)) == 1 else "softmax"
