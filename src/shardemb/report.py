"""What a person wants to know at a glance: lines for the terminal, tables for notebooks. Text in, text out."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Facts:
    """What is told about a table; `changed_rows` is None where nothing can be changed any more."""

    name: str
    num_embeddings: int
    embedding_dim: int
    optimizer: str
    step: int
    num_shards: int
    nbytes: int
    changed_rows: int | None


def one_line(facts: Facts) -> str:
    """Describe a table in a line.

    Examples
    --------
    >>> one_line(Facts("tokens", 1000, 8, "SGD(lr=0.1)", 3, 1, 32_000, 5))
    "Table 'tokens': 1,000 x 8 float32, SGD(lr=0.1), step 3, 1 shard, 5 changed rows not committed"
    """
    parts = [
        f"{facts.num_embeddings:,} x {facts.embedding_dim} float32",
        facts.optimizer,
        f"step {facts.step:,}",
        plural(facts.num_shards, "shard"),
    ]
    if facts.changed_rows is None:
        parts.append("closed")
    elif facts.changed_rows:
        parts.append(f"{plural(facts.changed_rows, 'changed row')} not committed")
    return f"Table {facts.name!r}: {', '.join(parts)}"


def html_table(tables: Sequence[Facts], caption: str = "") -> str:
    """Describe tables as an HTML table, one a row."""
    head = ("table", "rows", "dim", "optimizer", "step", "shards", "size", "changed rows")
    rows = [
        (
            facts.name,
            f"{facts.num_embeddings:,}",
            str(facts.embedding_dim),
            facts.optimizer,
            f"{facts.step:,}",
            f"{facts.num_shards:,}",
            size(facts.nbytes),
            "closed" if facts.changed_rows is None else f"{facts.changed_rows:,}",
        )
        for facts in tables
    ]
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{title}{_row('th', head)}{''.join(_row('td', row) for row in rows)}</table>"


def plural(count: int, noun: str) -> str:
    """Write a count and its noun: ``1 shard``, ``1,024 shards``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(nbytes: float) -> str:
    """Write a number of bytes.

    Examples
    --------
    >>> size(0), size(1536), size(204_800_000)
    ('0 B', '1.5 KiB', '195.3 MiB')
    """
    unit = 0
    while nbytes >= 1024 and unit < len(_UNITS) - 1:
        nbytes, unit = nbytes / 1024, unit + 1
    return f"{nbytes:.0f} B" if unit == 0 else f"{nbytes:.1f} {_UNITS[unit]}"


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
