"""Frozen dataclasses as JSON: the name of the class and its fields. Optimizers and initializers are stored so."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from shardemb.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")


def to_json(instance: Any) -> dict[str, object]:  # noqa: ANN401
    """Describe a dataclass instance by its name and fields.

    Examples
    --------
    >>> to_json(shardemb.optim.SGD(lr=0.5))
    {'name': 'SGD', 'lr': 0.5}
    """
    return {"name": type(instance).__name__} | {f.name: getattr(instance, f.name) for f in fields(instance)}


def from_json(what: str, classes: Mapping[str, type[T]], document: Mapping[str, object]) -> T:
    """Build the instance that `to_json` described.

    Raises
    ------
    FormatError
        The name is none of `classes`, a field is missing or unknown, or the class refuses a value.
    """
    values: dict[str, Any] = dict(document)
    name = values.pop("name", None)
    if not isinstance(name, str) or name not in classes:
        msg = f"{what} {name!r} is not one of {', '.join(classes)}"
        raise FormatError(msg)
    expected = {f.name for f in fields(classes[name])}  # type: ignore[arg-type]
    if set(values) != expected:
        msg = f"{what} {name} has the fields {sorted(values)} instead of {sorted(expected)}"
        raise FormatError(msg)
    try:
        return classes[name](**values)
    except (TypeError, ValueError) as error:
        msg = f"{what} {name}: {error}"
        raise FormatError(msg) from error
