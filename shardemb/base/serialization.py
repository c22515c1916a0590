"""Frozen dataclasses as JSON: the name of the class and its fields. Optimizers and initializers are stored so."""

from __future__ import annotations

from dataclasses import field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from shardemb.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")

_OPTIONAL = "optional"


def optional(default: Any) -> Any:  # noqa: ANN401
    """Declare a keyword-only field that is stored, and shown, only if it differs from its default.

    So what was stored before there was such a field can still be read, and programs that do not know it can read
    everything that does not use it.
    """
    return field(default=default, kw_only=True, metadata={_OPTIONAL: True})


def stored_fields(instance: Any) -> dict[str, object]:  # noqa: ANN401
    """Return the fields of a dataclass instance with their values, those that may be given by position first.

    Optional ones that have their default are left out.
    """
    ordered = sorted(fields(instance), key=lambda f: bool(f.kw_only))
    found = [(f, getattr(instance, f.name)) for f in ordered]
    return {f.name: value for f, value in found if _OPTIONAL not in f.metadata or value != f.default}


def to_json(instance: Any) -> dict[str, object]:  # noqa: ANN401
    """Describe a dataclass instance by its name and fields.

    Examples
    --------
    >>> to_json(shardemb.optim.SGD(lr=0.5))
    {'name': 'SGD', 'lr': 0.5}
    """
    return {"name": type(instance).__name__} | stored_fields(instance)


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
    known = {f.name: _OPTIONAL in f.metadata for f in fields(classes[name])}  # type: ignore[arg-type]
    expected = {each for each, is_optional in known.items() if not is_optional or each in values}
    if set(values) != expected:
        msg = f"{what} {name} has the fields {sorted(values)} instead of {sorted(expected)}"
        raise FormatError(msg)
    try:
        return classes[name](**values)
    except (TypeError, ValueError) as error:
        msg = f"{what} {name}: {error}"
        raise FormatError(msg) from error
