"""Vectors out of a store, one module for each format; the formats and what can be chosen about them.

Each takes any source of rows, not only a table, and works in bounded memory. A new format is a new module here, and a
class in ``formats.py``.
"""

from shardemb.exports.formats import (
    Arrow,
    Format,
    Lance,
    Npy,
    Parquet,
    Projector,
    Safetensors,
    Word2VecBinary,
    Word2VecText,
    format_of,
)
from shardemb.exports.targets import ExportReport

__all__ = [
    "Arrow",
    "ExportReport",
    "Format",
    "Lance",
    "Npy",
    "Parquet",
    "Projector",
    "Safetensors",
    "Word2VecBinary",
    "Word2VecText",
    "format_of",
]
