"""Paths given by the user: every one names something on this machine, or is refused before anything is created."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

_URL = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*::)*([a-z][a-z0-9+.-]+):/", re.IGNORECASE)
"""A scheme of at least two letters, also behind others as fsspec chains them. `pathlib` leaves one slash of two."""


def local_path(given: object, what: str) -> Path:
    """Check a path given by the user.

    Parameters
    ----------
    given : str or path-like
        A URL is refused: without the check, ``"s3://bucket/store"`` would become a local folder named ``s3:``.
    what : str
        What the path is for, to begin the message with.

    Returns
    -------
    Path
        As it was given: neither absolute nor resolved.

    Raises
    ------
    TypeError
        Neither a str nor an object that stands for a local path, such as `pathlib.Path`.
    ValueError
        A URL, an empty string, or a path with a zero byte.

    Examples
    --------
    >>> local_path("vectors/words.zarr", "the store")
    PosixPath('vectors/words.zarr')
    >>> local_path("s3://bucket/words.zarr", "the store")
    Traceback (most recent call last):
    ...
    ValueError: the store must be on a local disk, got the URL 's3://bucket/words.zarr': ...
    """
    # Text first: some path objects download what they stand for as soon as they are asked for a local path.
    found = _URL.match(str(given)) if isinstance(given, str | os.PathLike) else None
    if found is not None:
        raise ValueError(_about_url(str(given), found[1], what))
    path = os.fspath(given) if isinstance(given, str | os.PathLike) else given
    if not isinstance(path, str):
        msg = (
            f"{what} must be given as a path, a str or a pathlib.Path, got {type(given).__name__}: "
            f"{given!r:.80}; {_way_out(given)}"
        )
        raise TypeError(msg)
    if not path or "\0" in path:
        problem = "with a zero byte" if path else "that is empty; pass '.' for the current folder"
        msg = f"{what} must be given as a path, got one {problem}: {path!r:.80}"
        raise ValueError(msg)
    return Path(path)


def _about_url(given: str, scheme: str, what: str) -> str:
    way_out = (
        "pass a local path, and copy from or to there with a tool of that service "
        "(if a folder of this machine has such a name, pass its absolute path)"
    )
    if scheme.lower() == "file" and (path := unquote(urlsplit(given.strip()).path)):
        way_out = f"pass {path!r}"
    return f"{what} must be on a local disk, got the URL {given!r}: {way_out}"


def _way_out(given: object) -> str:
    if isinstance(given, bytes):
        return "pass os.fsdecode(path)"
    if hasattr(given, "read") or hasattr(given, "write"):
        return "pass the name of a file, because an open file or a buffer in memory cannot be replaced atomically"
    return "mappings, stores and file systems of other libraries are not taken: pass the path of a local file or folder"
