"""The command line: each subcommand end to end, its exit codes, and where its output goes."""

import json
import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import shardemb
from shardemb import cli
from shardemb.cli import main
from shardemb.dtypes import BlockScaled, ScaledInt8
from shardemb.precision import coded_rows


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "words.zarr"
    with shardemb.open(path) as store:
        table = store.create_table(
            "tokens", num_embeddings=300, embedding_dim=4, optimizer=shardemb.optim.Adam(lr=0.1)
        )
        table.update(np.arange(300), np.ones((300, 4), np.float32))
        store.commit(step=7, metadata={"loss": 0.5})
    return path


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_formats_that_commands_name_are_those_that_there_are():
    """Commands name them without loading what writes and reads them, so they are compared here."""
    from shardemb.exports import formats as of_exports
    from shardemb.imports import formats as of_imports

    assert tuple(of_exports.FORMATS) == cli.FORMATS
    known = re.search(r"Formats: (.*?);", " ".join(cli.import_.help.split()))
    assert tuple(known[1].split(", ")) == of_imports.FORMATS


def test_info_shows_what_a_person_wants_to_know(path):
    result = run("info", path)
    assert result.exit_code == 0
    for expected in (
        "1 at step 7",
        "tokens",
        "300 x 4 float32",
        "Adam(lr=0.1",
        "exp_avg, exp_avg_sq",
        '{"loss": 0.5}',
    ):
        assert expected in result.stdout


def test_info_as_json_prints_nothing_else(path):
    refused = run("info", path, "--json", "--plot")
    assert refused.exit_code == 2
    assert "--json prints one JSON object" in refused.output


def test_info_as_json_is_one_object(path):
    facts = json.loads(run("info", path, "--json").stdout)
    assert facts["commit"] == {"id": 1, "step": 7, "metadata": {"loss": 0.5}}
    (table,) = facts["tables"]
    assert (table["name"], table["num_embeddings"], table["embedding_dim"], table["step"]) == (
        "tokens",
        300,
        4,
        1,
    )
    assert 0 < table["bytes_on_disk"] <= facts["bytes_on_disk"]


def test_export_writes_rows_and_state(path, tmp_path):
    target = tmp_path / "tokens.parquet"
    result = run("export", path, "tokens", target, "--column", "exp_avg", "--rows", 10, 30)
    assert result.exit_code == 0, result.output
    assert "20 rows" in result.stdout
    written = pq.read_table(target)
    assert written["id"].to_pylist() == list(range(10, 30))
    with shardemb.open(path, mode="r") as store:
        for column, expected in (
            ("embedding", store["tokens"].lookup(range(10, 30))),
            ("exp_avg", store["tokens"].state("exp_avg", range(10, 30))),
        ):
            values = written[column].combine_chunks().flatten().to_numpy().reshape(20, 4)
            np.testing.assert_array_equal(values, expected)


@pytest.fixture
def keyed(path):
    """The store of `path`, with a table by key besides."""
    with shardemb.open(path) as store:
        store.create_vocabulary("names", key_type="string")
        table = store.create_table(
            "names", vocabulary="names", embedding_dim=2, optimizer=shardemb.optim.SGD(lr=1.0), counters=True
        )
        table.write(["a", "b", "c"], np.arange(6.0).reshape(3, 2), create=True)
        table.update(["b"], [[1.0, 1.0]])
        store.commit()
    return path


def test_export_in_the_format_of_the_suffix_or_of_the_option(keyed, tmp_path):
    assert run("export", keyed, "names", tmp_path / "n.vec", "--quiet").exit_code == 0
    assert (tmp_path / "n.vec").read_text() == "3 2\na 0 1\nb 1 2\nc 4 5\n"
    assert (
        run("export", keyed, "names", tmp_path / "n", "--format", "npy", "--changed-since", 0).exit_code == 0
    )
    assert np.load(tmp_path / "n").tolist() == [[1, 2]]
    assert (
        run("export", keyed, "names", tmp_path / "m.safetensors", "--tensor", "w", "--quiet").exit_code == 0
    )
    assert b'"w"' in (tmp_path / "m.safetensors").read_bytes()
    with shardemb.open(keyed) as store:
        store.tag("then")
        store["names"].delete(["a"])
        store.commit()
    changes = "export", keyed, "names", tmp_path / "c.vec", "--changed-since", "then", "--quiet"
    assert run(*changes).stdout.splitlines()[1] == f"{tmp_path / 'c.removed.parquet'}: 1 removed key"
    found = json.loads(run(*changes, "--json").stdout)
    assert (found["removed_path"], found["num_removed"]) == (str(tmp_path / "c.removed.parquet"), 1)
    sample = ("--format", "projector", "--sample", 1, "--by", "count", "--seed", 3)
    assert run("export", keyed, "names", tmp_path / "p", *sample).exit_code == 0
    assert (tmp_path / "p" / "metadata.tsv").read_text() == "b\n"


def test_export_of_rows_that_a_file_names(keyed, tmp_path):
    (tmp_path / "keys.txt").write_text("c\na\n")
    (tmp_path / "ids.txt").write_text("7\n200\n")
    np.save(tmp_path / "mask.npy", np.arange(300) % 100 == 7)
    for table, file, ids in (
        ("names", "keys.txt", [0, 2]),
        ("tokens", "ids.txt", [7, 200]),
        ("tokens", "mask.npy", [7, 107, 207]),
    ):
        target = tmp_path / "some.parquet"
        assert run("export", keyed, table, target, "--where", tmp_path / file).exit_code == 0
        assert pq.read_table(target)["id"].to_pylist() == ids


def test_export_in_partitions_and_continued(path, tmp_path):
    assert run("export", path, "tokens", tmp_path / "h", "--partition-by", "hash:2").exit_code == 0
    assert sorted(each.name for each in (tmp_path / "h").iterdir()) == ["bucket=0", "bucket=1"]
    assert run("export", path, "tokens", tmp_path / "s", "--partition-by", "shard", "--resume").exit_code == 0
    assert sorted(each.name for each in (tmp_path / "s").iterdir()) == ["_SUCCESS", "shard=0"]
    refused = run("export", path, "tokens", tmp_path / "x", "--partition-by", "key")
    assert refused.exit_code == 2
    assert "'key' is neither shard nor hash:N" in refused.stderr


def test_export_refuses_options_of_another_format(path, tmp_path):
    result = run("export", path, "tokens", tmp_path / "t.npy", "--partition-by", "shard", "--sample", 3)
    assert result.exit_code == 1
    assert "the format 'npy' has no --partition-by, --sample" in result.stderr
    assert not (tmp_path / "t.npy").exists()
    assert "does not tell the format" in run("export", path, "tokens", tmp_path / "t.hdf5").stderr


def test_export_writes_progress_as_lines(path, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    result = run("export", path, "tokens", tmp_path / "t.npy", "--log-progress")
    assert "export tokens: 300 rows in" in result.stderr


def test_export_in_parts(path, tmp_path):
    assert run("export", path, "tokens", tmp_path / "parts", "--parts", 3, "--quiet").exit_code == 0
    assert pq.read_table(tmp_path / "parts").num_rows == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "missing.zarr"), "there is no store at"),
        (("export", "words.zarr", "nobody", "out.parquet"), "no table 'nobody'; its tables: 'tokens'"),
        (("export", "words.zarr", "tokens", "no/such/folder/out.parquet"), "folder"),
        (("export", "words.zarr", "tokens", "out.parquet", "--column", "sum"), "sum"),
        (("export", "words.zarr", "tokens", "out.parquet", "--rows", "5", "301"), "301"),
    ],
)
def test_an_error_of_the_library_is_one_line_and_exit_code_1(path, monkeypatch, arguments, message):
    monkeypatch.chdir(path.parent)
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (path.parent / "out.parquet").exists()


@pytest.mark.parametrize(
    "arguments", [("info",), ("export", "a"), ("nonsense",), ("info", "a", "--nonsense")]
)
def test_a_wrong_command_line_is_exit_code_2(arguments):
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("command", ["quickstart", "info", "export"])
def test_help_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"shardemb {command}" in result.stdout.split("Example:")[1]


def test_quickstart_passes_its_options_on(tmp_path, monkeypatch):
    from shardemb.quickstart import training

    seen = []
    monkeypatch.setattr(training, "run", seen.append)
    result = run("quickstart", "--folder", tmp_path, "--vocabulary", 10, "--dim", 3, "--steps", 2, "--seed", 5,
                 "--commit-every", 1)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert seen == [training.Options(folder=tmp_path, vocabulary=10, dim=3, steps=2, seed=5, commit_every=1)]


def test_quickstart_defaults_are_the_librarys(tmp_path, monkeypatch):
    from shardemb.quickstart import training

    seen = []
    monkeypatch.setattr(training, "run", seen.append)
    assert run("quickstart").exit_code == 0
    assert seen == [training.Options()]


def test_the_installed_command_and_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "shardemb.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"shardemb, version {shardemb.__version__}"


def test_a_heat_map_shows_the_shards_by_rows_written(path, tmp_path):
    with shardemb.open(path) as store:
        table = store.create_table("sparse", num_embeddings=10_000, embedding_dim=16, rows_per_shard=1024)
        table.write(np.arange(1024, 2048), np.ones((1024, 16)))
        table.write(np.arange(4096, 4096 + 300), np.ones((300, 16)))
        store.commit()
    lines = run("info", path, "--plot").stdout.splitlines()
    assert lines[-4:] == ["|█|", "", lines[-2], "| █  ░     |"]
    picture = tmp_path / "map.png"
    assert run("info", path, "--plot", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_tables_are_resized_resharded_materialized_and_copied(path, tmp_path):
    with shardemb.open(path, "r") as store:
        before = store["tokens"].lookup(np.arange(300))
    result = run("resize", path, "tokens", 100)
    assert result.exit_code == 1
    assert "drop_rows=True" in result.stderr
    assert "400 x 4" in run("resize", path, "tokens", 400).stdout
    assert run("reshard", path, "tokens", "--rows-per-shard", 64, "--quiet").exit_code == 0
    assert "no optimizer" in run("reshard", path, "tokens", "--drop-optimizer", "--quiet").stdout
    assert run("materialize", path, "tokens", "--quiet").exit_code == 0
    copy = tmp_path / "copy.zarr"
    assert run("copy", path, copy, "--quiet").exit_code == 0
    assert "a copy needs a new folder" in run("copy", path, copy).stderr
    with shardemb.open(copy, "r") as store:
        assert (store.last_commit.id, store.last_commit.metadata) == (4, {"loss": 0.5})
        np.testing.assert_array_equal(store["tokens"].lookup(np.arange(300)), before)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["export", "STORE", "tokens", "TARGET"], {"num_rows": 300}),
        (["resize", "STORE", "tokens", "400"], {"name": "tokens", "num_embeddings": 400}),
        (
            ["reshard", "STORE", "tokens", "--rows-per-shard", "128"],
            {"name": "tokens", "num_embeddings": 300},
        ),
        (["materialize", "STORE", "tokens"], {"name": "tokens", "num_embeddings": 300}),
        (["copy", "STORE", "TARGET"], {"commit": {"id": 1, "step": 7, "metadata": {"loss": 0.5}}}),
        (["verify", "STORE"], {"damage": []}),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_every_result_can_be_one_object(path, tmp_path, arguments, expected):
    paths = {"STORE": path, "TARGET": tmp_path / "target"}
    result = run(*(paths.get(each, each) for each in arguments), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("command", ["info", "verify", "copy"])
def test_ctrl_c_is_exit_code_130(path, tmp_path, monkeypatch, command):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(shardemb, "open", interrupted)
    result = run(command, path, *([tmp_path / "copy"] if command == "copy" else []))
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


def test_the_shell_completes_tables(path):
    def completed(store, word):
        script = {
            "_SHARDEMB_COMPLETE": "bash_complete",
            "COMP_WORDS": f"shardemb export {store} {word}",
            "COMP_CWORD": "3",
        }
        return CliRunner().invoke(main, prog_name="shardemb", env=script).stdout.split()

    with shardemb.open(path) as store:
        store.create_table("other", num_embeddings=3, embedding_dim=2)
        store.commit()
    assert completed(path, "") == ["plain,tokens", "plain,other"]
    assert completed(path, "to") == ["plain,tokens"]
    assert completed(path.parent / "nothing", "to") == []


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_printed(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("info", path, "--plot", "shards.png")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "pip install 'shardemb[plot]'" in result.stderr


def test_the_picture_of_one_shard_has_its_number(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    cli._draw({"t": [0.5]}, tmp_path / "one.png")
    axes = drawn[0].axes[0]
    assert [each for each in axes.get_xticks() if -0.5 <= each <= 0.5] == [0]


def test_kernels_can_be_compiled_ahead(monkeypatch):
    pairs, gather = set(), coded_rows.gather

    def noted(stored, wanted):
        pairs.add((stored.label, wanted))
        return gather(stored, wanted)

    monkeypatch.setattr(coded_rows, "gather", noted)
    result = run("warm-up", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    short = ["float16", "float8_e4m3fn", "float8_e5m2", str(ScaledInt8()), str(BlockScaled())]
    assert pairs >= {(stored, wanted) for stored in short for wanted in ("float32", "bfloat16")}
    assert pairs >= {
        ("float32", "bfloat16"),
        ("float32", "float16"),
        ("bfloat16", "float32"),
        ("bfloat16", "float16"),
    }


def test_tags_are_made_moved_restored_and_released(path):
    assert json.loads(run("tag", path, "best", "--json").stdout) == {
        "id": 1,
        "step": 7,
        "metadata": {"loss": 0.5},
    }
    refused = run("tag", path, "best")
    assert (refused.exit_code, "pass replace=True" in refused.output) == (1, True)
    with shardemb.open(path) as store:
        before = store["tokens"].lookup(np.arange(300))
        store["tokens"].update([1], np.ones((1, 4), np.float32))
        store.commit(step=8)
    assert "commit       1 at step 7" in run("info", path).stdout
    assert run("restore", path, "best").stdout == "commit 3 at step 7, as it was in 'best'\n"
    with shardemb.open(path, "r") as store:
        assert np.array_equal(store["tokens"].lookup(np.arange(300)), before)
    assert run("tag", path, "best", "--replace").stdout == "tag 'best' keeps commit 3 at step 7\n"
    assert run("untag", path, "best").stdout == "released 'best'\n"
    assert run("untag", path, "best").exit_code == 1
