"""A table as a Lance dataset, which Lance's own library writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from shardemb.base.progress import track
from shardemb.exports import targets
from shardemb.exports.arrow import Selection
from shardemb.exports.targets import ExportReport
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardemb.base.progress import Progress
    from shardemb.exports.selection import RowSet, RowSource


def export_lance(source: RowSource, path: object, rows: RowSet, *, progress: Progress = None) -> ExportReport:
    """Write a Lance dataset: a folder with the columns of the Arrow format.

    Raises
    ------
    ImportError
        pylance is not installed.
    FileExistsError
        There is something at the path.
    """
    try:
        import lance
    except ImportError as error:
        msg = f"table {source.name!r}: Lance datasets are written by its own library: pip install pylance"
        raise ImportError(msg) from error
    chosen = Selection.of(source, (), rows)
    target = targets.checked(path, source.name, folder=False)
    if target.exists():
        msg = f"table {source.name!r}: cannot export to {target}: a dataset needs a new name, or remove what is there"
        raise FileExistsError(msg)
    written = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal written
        for batch in chosen.stream():
            written += batch.num_rows
            yield batch
            advance(batch.num_rows)

    with (
        track(chosen.num_rows, f"export {source.name}", progress=progress) as advance,
        targets.staged(target, ["dataset"]) as temporary,
    ):
        reader = pa.RecordBatchReader.from_batches(chosen.schema, batches())
        lance.write_dataset(reader, str(temporary), mode="create")
        names = sorted(each.relative_to(temporary) for each in files.walk(temporary))
        files.sync_tree(temporary)
    return ExportReport.of([target / name for name in names], written, target)
