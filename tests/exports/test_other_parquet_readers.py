"""What Spark and fastparquet make of an export: they know less of parquet than pyarrow, duckdb and polars do.

Both are heavy, and Spark needs Java, so these tests run only where they are installed: tried with pyspark 4.0.1 and
4.3.0, fastparquet 2026.9.0. Each has a process of its own, because Spark leaves a virtual machine and threads behind.
"""

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import shardemb

ROWS, DIM = 70_000, 3
"""More than one row group."""

FASTPARQUET = """
import json, sys
import fastparquet
for path in sys.argv[1:]:
    frame = fastparquet.ParquetFile(path).to_pandas()
    print(json.dumps([[int(i), k if isinstance(k, str) else k.decode(), [float(v) for v in e], float(s)]
                      for i, k, e, s in zip(frame["id"], frame["key"], frame["embedding"], frame["sum"])]))
"""

SPARK = """
import json, sys
from pyspark.sql import SparkSession
spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
for path in sys.argv[1:]:
    frame = spark.read.parquet(path)
    assert frame.filter("id = 69999").count() == 1  # by the statistics
    print(json.dumps([list(row) for row in frame.select("id", "key", "embedding", "sum").orderBy("id").collect()]))
spark.stop()
"""

READERS = {"fastparquet": FASTPARQUET, "pyspark": SPARK}


@pytest.fixture(params=READERS)
def read(request):
    if importlib.util.find_spec(request.param) is None or (
        request.param == "pyspark" and not shutil.which("java")
    ):
        pytest.skip(f"{request.param} is not installed")

    def read(*paths):
        command = [sys.executable, "-c", READERS[request.param], *map(str, paths)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]

    return read


@pytest.fixture
def table(store):
    words = store.create_vocabulary("w", key_type="string")
    words.add([f"wört {number}" for number in range(ROWS)])
    return store.create_table(
        "w",
        vocabulary="w",
        embedding_dim=DIM,
        initializer=shardemb.initializers.Uniform(-1, 1, seed=0),
        optimizer=shardemb.optim.RowWiseAdagrad(),
    )


def assert_equal(table, found):
    rows = np.arange(ROWS)
    assert [each[0] for each in found] == rows.tolist()
    assert [each[1] for each in found] == table.vocabulary.keys(rows).tolist()
    np.testing.assert_array_equal([each[2] for each in found], table.rows.lookup(rows))
    np.testing.assert_array_equal([each[3] for each in found], table.rows.state("sum", rows).reshape(-1))


@pytest.mark.slow
def test_an_export_with_the_defaults_can_be_read(tmp_path, table, read):
    reports = [
        table.export_parquet(tmp_path / f"{parts}", columns=["sum"], parts=parts) for parts in (None, 3)
    ]
    found = read(*(report.path for report in reports))
    assert len(found) == 2
    for each in found:
        assert_equal(table, each)
