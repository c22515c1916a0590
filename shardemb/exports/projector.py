"""A sample of rows for TensorBoard's embedding projector, and for its stand-alone page.

TensorBoard reads a folder: ``projector_config.pbtxt``, which names ``tensors.tsv`` and ``metadata.tsv``. The page reads
``projector_config.json`` instead, which names ``tensors.bytes``, the same numbers as float32.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from shardemb.base import validation
from shardemb.base.progress import track
from shardemb.exports import targets, words
from shardemb.exports.arrow import Selection
from shardemb.exports.selection import Query, RowSet, most_frequent, with_keys
from shardemb.exports.targets import ExportReport
from shardemb.storage import files

if TYPE_CHECKING:
    from shardemb.base.progress import Progress
    from shardemb.exports.selection import RowSource

NAMES = ("tensors.tsv", "tensors.bytes", "metadata.tsv", "projector_config.pbtxt", "projector_config.json")


class Sample(NamedTuple):
    """Which of the selected rows are shown.

    Attributes
    ----------
    rows : int or array_like
        How many; or row ids, or keys where the table has some.
    by : {"random", "count"}
        How a number of them is chosen: by chance, or those that were updated most often.
    seed : int
        The same seed chooses the same rows of as many.
    """

    rows: Any
    by: str
    seed: int

    def of(self, source: RowSource, rows: RowSet) -> RowSet:
        """Choose some of the rows."""
        if not isinstance(self.rows, int | np.integer) or isinstance(self.rows, bool):
            return rows & Query(where=self.rows).of(source)
        number = validation.count(self.rows, "sample")
        if self.by not in ("random", "count"):
            msg = f'table {source.name!r}: a sample is chosen by "random" or "count", got {self.by!r}'
            raise ValueError(msg)
        if self.by == "count":
            return most_frequent(source, rows, number)
        if number >= rows.num_rows:
            return rows
        places = np.random.default_rng(self.seed).choice(rows.num_rows, number, replace=False, shuffle=False)
        return RowSet.of_ids(rows.at(np.sort(places)))


def export_projector(
    source: RowSource, path: object, rows: RowSet, sample: Sample, *, progress: Progress = None
) -> ExportReport:
    """Write a folder with a sample of the rows.

    Raises
    ------
    ValueError
        The table holds raw bytes, or has no counters where these choose.
    """
    words.require_numbers(source, "the projector shows")
    chosen = Selection.of(source, (), sample.of(source, with_keys(source, rows)), most_bytes=words.TEXT_BYTES)
    target = targets.checked(path, source.name, folder=True)
    with (
        track(chosen.num_rows, f"export {source.name}", progress=progress) as advance,
        targets.staged(target, NAMES) as temporary,
    ):
        with (
            targets.new_file(temporary / "tensors.tsv") as text,
            targets.new_file(temporary / "tensors.bytes") as numbers,
            targets.new_file(temporary / "metadata.tsv") as labels,
        ):
            for first, last in chosen.ranges():
                vectors, keys = chosen.read_vectors("float32", first, last)
                text.write(words.lines(vectors, "\t"))
                numbers.write(vectors.reshape(-1).data)
                labels.write(_labels(chosen.rows.ids(first, last) if keys is None else keys))
                advance(last - first)
        for name, content in _documents(source, chosen.num_rows).items():
            with targets.new_file(temporary / name) as sink:
                sink.write(content.encode())
        files.sync_directory(temporary)
    return ExportReport.of([target / name for name in NAMES], chosen.num_rows, target)


def _labels(keys: Any) -> memoryview:  # noqa: ANN401
    """Return a line for each row; what would end a column or a line in a key becomes a blank."""
    tokens = words.as_tokens(keys)
    if words.first_with(tokens, b"\t\r\n") is not None:
        # Key by key: a sample is small, and hardly any has such keys.
        plain = [each.as_py().translate(_BLANKS) for each in tokens]
        tokens = pa.array(plain, pa.large_binary())
    return words.with_line_ends(tokens)


_BLANKS = bytes(32 if byte in b"\t\r\n" else byte for byte in range(256))


def _documents(source: RowSource, num_rows: int) -> dict[str, str]:
    """Return the two descriptions of the same files."""
    name = json.dumps(source.name)
    paths = {"tensor_path": "tensors.tsv", "metadata_path": "metadata.tsv"}
    fields = "".join(f"  {field}: {json.dumps(path)}\n" for field, path in paths.items())
    page = {
        "tensorName": source.name,
        "tensorShape": [num_rows, source.embedding_dim],
        "tensorPath": "tensors.bytes",
        "metadataPath": "metadata.tsv",
    }
    return {
        "projector_config.pbtxt": f"embeddings {{\n  tensor_name: {name}\n{fields}}}\n",
        "projector_config.json": json.dumps({"embeddings": [page]}, indent=2),
    }
