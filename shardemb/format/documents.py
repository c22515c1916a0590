"""JSON documents and their checksums: reading them while believing nothing that they say."""

from __future__ import annotations

import json
import re
import zlib
from typing import TYPE_CHECKING, Any

from shardemb.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    pass


FORMAT_VERSION = 1


_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises
    ------
    FormatError
        Not a JSON object.
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


def crc32(document: Mapping[str, object]) -> int:
    """Return the checksum of a JSON object, however it is laid out, over all but its own ``crc32``."""
    rest = {name: value for name, value in document.items() if name != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def require_version(document: Mapping[str, Any]) -> None:
    """Refuse what a newer shardemb wrote.

    Raises
    ------
    FormatError
        No version, or a newer one.
    """
    version = int_field(document, "format_version", 2**31)
    if version > FORMAT_VERSION:
        msg = (
            f"format version {version} is newer than {FORMAT_VERSION}, the newest that this shardemb reads; "
            f"upgrade shardemb"
        )
        raise FormatError(msg)


def field(document: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:  # noqa: ANN401
    """Take a value of a JSON object, of the given type.

    Raises
    ------
    FormatError
        It is missing or of another type.
    """
    value = document.get(name)
    if name not in document or not isinstance(value, kind):
        msg = f"{name} is {value!r}"
        raise FormatError(msg)
    return value


def uuid_field(document: Mapping[str, Any], name: str = "uuid") -> str:
    """Take the uuid of a JSON object, which names folders too.

    Raises
    ------
    FormatError
        It is missing or not a uuid.
    """
    text = field(document, name, str)
    if not _UUID.fullmatch(text):
        msg = f"{name} is {text!r}"
        raise FormatError(msg)
    return str(text)


def int_field(document: Mapping[str, Any], name: str, maximum: int, *, minimum: int = 1) -> int:
    """Take an integer of a JSON object, within its limits.

    Raises
    ------
    FormatError
        It is missing, not an integer, or out of the limits.
    """
    value = field(document, name, int)
    if isinstance(value, bool) or not minimum <= value <= maximum:
        msg = f"{name} is {value!r}"
        raise FormatError(msg)
    return int(value)


def checksum(data: bytes | memoryview) -> int:
    """Checksum of headers and payloads: XXH3, 64 bits."""
    return xxhash.xxh3_64_intdigest(data)
