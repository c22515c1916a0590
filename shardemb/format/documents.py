"""Parsing of JSON documents, which trusts nothing that it reads, and the checksums of documents and records."""

from __future__ import annotations

import json
import re
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from shardemb.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

FORMAT_VERSION = 1

CODED_VERSION, NUMBERED_VERSION = 2, 3
"""Versions of the document of a table whose records are not float32, and of a part of a table, whatever they are."""

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises
    ------
    FormatError
        The data is not a JSON object.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        msg = f"it is not JSON ({error})"
        raise FormatError(msg) from error
    if not isinstance(document, dict):
        msg = "it is not a JSON object"
        raise FormatError(msg)
    return document


def require_version(document: Mapping[str, Any], newest: int = FORMAT_VERSION) -> int:
    """Refuse a document that a newer shardemb wrote; return its version.

    Raises
    ------
    FormatError
        The document has no version, or a newer one.
    """
    version = int_field(document, "format_version", 2**31)
    if version > newest:
        msg = (
            f"format version {version} is newer than {newest}, the newest that this shardemb reads; "
            f"upgrade shardemb"
        )
        raise FormatError(msg)
    return version


def field(document: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:  # noqa: ANN401
    """Return a value of a JSON object, which must have the given type.

    Raises
    ------
    FormatError
        The value is missing or has another type.
    """
    value = document.get(name)
    if name not in document or not isinstance(value, kind):
        msg = f"{name} is {value!r}"
        raise FormatError(msg)
    return value


def uuid_field(document: Mapping[str, Any], name: str = "uuid") -> str:
    """Return a uuid from a JSON object. It is checked strictly because folders are named after it.

    Raises
    ------
    FormatError
        The value is missing or not a uuid.
    """
    text = field(document, name, str)
    if not _UUID.fullmatch(text):
        msg = f"{name} is {text!r}"
        raise FormatError(msg)
    return str(text)


def int_field(document: Mapping[str, Any], name: str, maximum: int, *, minimum: int = 1) -> int:
    """Return an integer from a JSON object, which must be between `minimum` and `maximum`, both included.

    Raises
    ------
    FormatError
        The value is missing, not an integer, or out of range.
    """
    value = field(document, name, int)
    if isinstance(value, bool) or not minimum <= value <= maximum:  # to Python, True is an int
        msg = f"{name} is {value!r}"
        raise FormatError(msg)
    return int(value)


def crc32(document: Mapping[str, object]) -> int:
    """Return the checksum of a JSON object, over everything but its own ``crc32``, however the file formats it."""
    rest = {name: value for name, value in document.items() if name != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def checksum(data: bytes | memoryview) -> int:
    """Return the checksum of binary data (blocks of files, headers, payloads): XXH3, 64 bits, seed 0."""
    return xxhash.xxh3_64_intdigest(data)


def checksums(parts: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> NDArray[np.uint64]:
    """Return the checksum of each row of an array, or of each array."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, parts), np.uint64, len(parts))
