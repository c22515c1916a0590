"""The command ``shardemb``: each subcommand is one call into the library.

Exit codes: 0 done; 1 an error, whose message is on stderr; 2 a wrong command line; 130 Ctrl-C.
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import asdict, fields, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import click
import numpy as np

import shardemb
from shardemb.base import formatting, paths
from shardemb.session import display

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Show an error of the library as one line, without a traceback."""
    try:
        yield
    except (shardemb.ShardEmbError, OSError, ValueError, TypeError, ImportError) as error:
        raise click.ClickException(str(error)) from error


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401
        """End as other programs do that Ctrl-C has interrupted."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)


def _complete_table(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the tables of the store that is on the command line already, for the shell."""
    try:
        with shardemb.open(ctx.params["store"], mode="r") as store:
            return [name for name in store if name.startswith(incomplete)]
    except (shardemb.ShardEmbError, OSError, ValueError):
        return []


FORMATS = (
    "parquet", "arrow", "word2vec-text", "word2vec-binary", "npy", "safetensors", "lance", "projector",
)  # fmt: skip
"""As `shardemb.exports` names them; not asked there, because that would load what most commands do not need."""

store_argument = click.argument("store", type=click.Path())
table_argument = click.argument("table", shell_complete=_complete_table)
quiet_option = click.option("--quiet", is_flag=True, help="No progress on stderr.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")


def _answer(text: str, document: object, *, as_json: bool) -> None:
    """Print what was done, for people or for programs."""
    click.echo(json.dumps(document, indent=2) if as_json else text)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(shardemb.__version__, prog_name="shardemb")
def main() -> None:
    """Embedding tables larger than memory.

    \b
    Example:
      shardemb quickstart
      shardemb info quickstart/store.zarr
    """


@main.command()
@click.option("--folder", type=click.Path(), default="quickstart", show_default=True,
              help="Folder for the store and parquet file.")  # fmt: skip
@click.option("--vocabulary", type=int, help="Number of words.")
@click.option("--dim", type=int, help="Dimension of a vector.")
@click.option("--steps", type=int, help="Batches to train on.")
@click.option("--seed", type=int, help="The same seed gives the same vectors.")
@click.option("--commit-every", type=int, help="Steps between commits.")
def quickstart(folder: str, **given: int | None) -> None:
    """Train word vectors on the documentation that comes with Python.

    Continues from the last commit if there is one in the folder. Takes less than a minute on two cores.

    \b
    Example:
      shardemb quickstart --folder /tmp/words --steps 500
    """
    from shardemb.quickstart.training import Options, run

    with _refusals():
        chosen = {name: value for name, value in given.items() if value is not None}
        run(Options(folder=paths.local_path(folder, "--folder"), **chosen))


@main.command()
@store_argument
@json_option
@click.option("--plot", is_flag=False, flag_value="-", metavar="[FILE]",
              help="Also show which shards have been written, as a heat map: here, or in a PNG file.")  # fmt: skip
def info(store: str, as_json: bool, plot: str | None) -> None:
    """Show what a store holds: its last commit, its tables, its size.

    \b
    Example:
      shardemb info words.zarr --json
      shardemb info words.zarr --plot
      shardemb info words.zarr --plot words.png
    """
    if as_json and plot == "-":
        msg = "--json prints one JSON object and nothing else: give --plot a file, or leave one of them out"
        raise click.UsageError(msg)
    with _refusals():
        target = paths.local_path(plot, "the picture") if plot and plot != "-" else None
        if target is not None:
            _require_matplotlib()
        with shardemb.open(store, mode="r") as opened:
            facts = opened.info()
            shares = {name: _written_shares(_rows(opened, name)) for name in opened} if plot else {}
    _answer(display.describe(facts), asdict(facts), as_json=as_json)
    if plot == "-":
        for name, each in shares.items():
            click.echo(f"\nRows written of {name!r}, one character per shard, from none to all: ' ·░▒▓█'")
            for line in display.heat_map(each):
                click.echo(f"|{line}|")
    elif target is not None:
        with _refusals():
            _draw(shares, target)


def _rows(store: shardemb.Store, name: str) -> shardemb.Table:
    """Return a table by its name, as a `Table` of row ids even if it has a vocabulary."""
    table = store[name]
    return table.rows if isinstance(table, shardemb.KeyedTable) else table


def _written_shares(table: shardemb.Table) -> list[float]:
    """Return for each shard what share of its rows was written."""
    rows, total = table.rows_per_shard, table.num_embeddings
    return [
        shard["rows_written"] / min(rows, total - number * rows)
        for number, shard in enumerate(table.stats()["shards"])
    ]


def _require_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        msg = "a picture needs matplotlib: pip install 'shardemb[plot]'; or omit the file name to see it here"
        raise ValueError(msg) from error


def _draw(shares: dict[str, list[float]], path: Path) -> None:
    """Draw a heat map of every table into one PNG file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 0.6 + 1.2 * len(shares)), layout="constrained")
    for axes, (name, each) in zip(
        figure.subplots(len(shares), squeeze=False)[:, 0], shares.items(), strict=True
    ):
        image = axes.imshow([each], aspect="auto", vmin=0, vmax=1, interpolation="nearest")
        axes.set(title=name, xlabel="shard", yticks=[], xlim=(-0.5, len(each) - 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figure.colorbar(image, ax=axes, label="rows written")
    figure.savefig(path, format="png")


@main.command()
@store_argument
@click.option("--table", "tables", multiple=True, help="Check only this table; may be repeated.")
@json_option
@quiet_option
def verify(store: str, tables: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """Compare a store with its checksums, and report the rows that the disk has damaged.

    Changes nothing, and may run while the store is being written to. Exit code 1 if anything is wrong.

    \b
    Example:
      shardemb verify words.zarr --json
    """
    with _refusals(), shardemb.open(store, mode="r") as opened:
        damage = opened.verify(tables or None, progress=not quiet)
    found = f"{formatting.plural(len(damage), 'problem')} found" if damage else "nothing is wrong"
    _answer(
        "\n".join([*map(str, damage), found]), {"damage": [asdict(each) for each in damage]}, as_json=as_json
    )
    if damage:
        raise click.exceptions.Exit(1)


def _partition(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:  # noqa: ANN401
    """Return what `shardemb.exports.Parquet` takes for ``shard`` or ``hash:N``."""
    if value is None or value == "shard":
        return value
    kind, _, number = value.partition(":")
    if kind != "hash" or not number.isdecimal():
        msg = f"{value!r} is neither shard nor hash:N"
        raise click.BadParameter(msg)
    return ("hash", int(number))


@main.command()
@store_argument
@table_argument
@click.argument("output", type=click.Path())
@click.option("--format", "format_name", type=click.Choice(FORMATS), metavar="FORMAT",
              help=f"One of {', '.join(FORMATS)}; by default that of the suffix, parquet without one.")  # fmt: skip
@click.option(
    "--column", "columns", multiple=True, help="Optimizer state column to include; may be repeated."
)
@click.option(
    "--rows", type=(int, int), metavar="START STOP", help="Half-open range of row ids; all rows by default."
)
@click.option("--where", type=click.File("rb"), metavar="FILE",
              help="Only these: a .npy file of a bool for each row or of row ids, or an id or key a line.")  # fmt: skip
@click.option("--changed-since", metavar="TAG|STEP",
              help="Only what differs from a tag, and the keys that are gone; or updated after a step.")  # fmt: skip
@click.option("--parts", type=int, help="Parquet: write a folder of this many files, several at a time.")
@click.option("--partition-by", callback=_partition, metavar="shard|hash:N",
              help="Parquet: write a folder for each row-shard, or for each of N buckets of keys.")  # fmt: skip
@click.option("--encoding", type=click.Choice(["plain", "byte_stream_split"]),
              help="Parquet: how values are stored. plain, the default, can be read by every program.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Parquet: continue an export in parts that was interrupted.")
@click.option("--tensor", help="safetensors: name of the tensor.  [default: embedding]")
@click.option("--max-bytes", type=int, help="safetensors: most bytes of vectors in a file.  [default: 5 GB]")
@click.option("--sample", type=int, help="projector: how many rows.  [default: 10000]")
@click.option("--by", type=click.Choice(["random", "count"]),
              help="projector: choose rows by chance, which is the default, or those updated most often.")  # fmt: skip
@click.option("--seed", type=int, help="projector: the same seed chooses the same rows.")
@click.option("--log-progress", is_flag=True, help="Progress as lines of text on a terminal too.")
@json_option
@quiet_option
def export(
    store: str,
    table: str,
    output: str,
    format_name: str | None,
    columns: tuple[str, ...],
    rows: tuple[int, int] | None,
    where: BinaryIO | None,
    changed_since: str | None,
    resume: bool,
    log_progress: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Write a table, or some of its rows, to files of another program's format.

    \b
    Example:
      shardemb export words.zarr tokens tokens.parquet
      shardemb export words.zarr tokens tokens --parts 4 --column exp_avg
      shardemb export words.zarr tokens tokens.vec --rows 0 100000
      shardemb export words.zarr tokens sample --format projector --sample 5000
    """
    progress: Any = not quiet and ("lines" if log_progress else True)
    with _refusals(), shardemb.open(store, mode="r") as opened:
        form = _format(
            output, format_name, {name: each for name, each in options.items() if each is not None}
        )
        source = opened[table]
        written = source.export(
            output,
            form,
            columns=columns,
            rows=rows,
            where=None if where is None else _rows_of_file(where, source),
            changed_since=int(changed_since)
            if changed_since and changed_since.isdecimal()
            else changed_since,
            resume=resume,
            progress=progress,
        )
    lines = [
        f"{written.path}: {formatting.plural(written.num_rows, 'row')}, {formatting.size(written.nbytes)}"
    ]
    paths_written: dict[str, Any] = {"path": str(written.path), "files": list(map(str, written.files))}
    if written.removed_path is not None:
        lines.append(f"{written.removed_path}: {formatting.plural(written.num_removed, 'removed key')}")
        paths_written["removed_path"] = str(written.removed_path)
    _answer("\n".join(lines), asdict(written) | paths_written, as_json=as_json)


@main.command("import")
@click.argument("source", type=click.Path())
@click.argument("store", type=click.Path())
@click.argument("name")
@click.option("--format", "format_", help="Such as glove or npy; by default it is guessed.")
@click.option("--member", help="Which array or tensor, in a file that has several.")
@click.option(
    "--column", "columns", multiple=True, help="The column of vectors; or that of keys, then that of vectors."
)
@click.option("--tokens", type=click.Path(), help="A text file with one token a line, for rows without keys.")
@click.option("--limit", type=int, help="Import at most so many rows.")
@click.option("--dtype", help="What rows are stored as, such as bfloat16; by default as in the file.")
@click.option("--duplicates", type=click.Choice(["first", "error"]), default="first", show_default=True,
              help="What becomes of rows whose key has come before.")  # fmt: skip
@click.option("--unicode-errors", type=click.Choice(["strict", "replace", "ignore"]), default="strict",
              show_default=True, help="What becomes of tokens that are not UTF-8.")  # fmt: skip
@json_option
@quiet_option
def import_(
    source: str,
    store: str,
    name: str,
    format_: str | None,
    member: str | None,
    columns: tuple[str, ...],
    tokens: str | None,
    limit: int | None,
    dtype: str | None,
    duplicates: Literal["first", "error"],
    unicode_errors: Literal["strict", "replace", "ignore"],
    as_json: bool,
    quiet: bool,
) -> None:
    """Create a table from a file of another program, and commit that. The store is created if it is missing.

    \b
    Formats: word2vec-text, word2vec-binary, glove, fasttext-text, fasttext-binary, npy, safetensors, gguf, parquet,
             arrow, torch, hdf5, zarr; also compressed with gzip, bz2 or zstd.
    \b
    Example:
      shardemb import glove.6B.50d.txt words.zarr glove
      shardemb import model.safetensors words.zarr tokens --member embeddings.word_embeddings.weight
    """
    with _refusals(), shardemb.open(store) as opened:
        report = opened.import_table(
            name,
            paths.local_path(source, "FILE"),
            format_,
            member=member,
            columns=columns,
            tokens=tokens,
            limit=limit,
            dtype=dtype,
            duplicates=duplicates,
            unicode_errors=unicode_errors,
            progress=not quiet,
        )
        last = opened.last_commit
        opened.commit(metadata=last.metadata if last else None)
    left_out = f", {formatting.plural(report.duplicates, 'duplicate')} left out" if report.duplicates else ""
    shape = f"{formatting.plural(report.num_rows, 'row')} of {report.embedding_dim}"
    _answer(f"{name}: {shape} from {report.format}{left_out}", asdict(report), as_json=as_json)


def _format(output: str, name: str | None, options: dict[str, Any]) -> Any:  # noqa: ANN401
    """Return the format that is named, or that the suffix names, with its options."""
    kind = shardemb.exports.format_of(output, name or (None if PurePath(output).suffix else "parquet"))
    known = {each.name for each in fields(kind)}
    if wrong := sorted(set(options) - known):
        flags = ", ".join(f"--{each.replace('_', '-')}" for each in wrong)
        msg = f"the format {kind.name!r} has no {flags}; leave it out, or name another format with --format"
        raise ValueError(msg)
    return replace(kind, **options)


def _rows_of_file(file: BinaryIO, table: Any) -> Any:  # noqa: ANN401
    """Read a mask, row ids or keys."""
    content = file.read()
    if content.startswith(b"\x93NUMPY"):
        return np.lib.format.read_array(io.BytesIO(content))
    lines = content.splitlines()
    key_type = table.vocabulary.key_type if isinstance(table, shardemb.KeyedTable) else "int64"
    if key_type == "bytes":
        return lines
    return [int(line) for line in lines] if key_type == "int64" else [line.decode() for line in lines]


@main.command()
@store_argument
@table_argument
@click.option("--rows-per-shard", type=int, help="Rows in a shard; rounded up to whole pages.")
@click.option("--drop-optimizer", is_flag=True, help="Keep only the weights.")
@json_option
@quiet_option
def reshard(
    store: str, table: str, rows_per_shard: int | None, drop_optimizer: bool, as_json: bool, quiet: bool
) -> None:
    """Rewrite a table with shards of another size, or without its optimizer's state, and commit that.

    If interrupted, the table is unchanged, and the same command continues where it stopped.

    \b
    Example:
      shardemb reshard words.zarr tokens --rows-per-shard 1048576
    """
    with _refusals(), shardemb.open(store, mode="r+") as opened:
        optimizer: Literal["keep"] | None = None if drop_optimizer else "keep"
        opened.reshard(table, rows_per_shard=rows_per_shard, optimizer=optimizer, progress=not quiet)
        _show(opened, table, as_json=as_json)


@main.command()
@store_argument
@table_argument
@click.argument("rows", type=int)
@click.option(
    "--drop-rows", is_flag=True, help="Allow fewer rows than now; the rows past the new end are lost."
)
@json_option
def resize(store: str, table: str, rows: int, drop_rows: bool, as_json: bool) -> None:
    """Change the number of rows of a table, and commit that.

    \b
    Example:
      shardemb resize words.zarr tokens 2000000
    """
    with _refusals(), shardemb.open(store, mode="r+") as opened:
        _rows(opened, table).resize(rows, drop_rows=drop_rows)
        opened.commit(metadata=opened.last_commit.metadata if opened.last_commit else None)
        _show(opened, table, as_json=as_json)


def _show(store: shardemb.Store, name: str, *, as_json: bool) -> None:
    """Show a table as it is now."""
    (facts,) = (each for each in store.info().tables if each.name == name)
    _answer(repr(_rows(store, name)), asdict(facts), as_json=as_json)


@main.command()
@store_argument
@table_argument
@json_option
@quiet_option
def materialize(store: str, table: str, as_json: bool, quiet: bool) -> None:
    """Write the initial values of rows that were never written, for readers that know only zarr.

    If interrupted, it continues where it stopped when it is run again.

    \b
    Example:
      shardemb materialize words.zarr tokens
    """
    with _refusals(), shardemb.open(store, mode="r+") as opened:
        _rows(opened, table).materialize(progress=not quiet)
        _show(opened, table, as_json=as_json)


@main.command()
@store_argument
@click.argument("target", type=click.Path())
@click.option(
    "--update", is_flag=True, help="Bring the copy that is there up to date: write only what has changed."
)
@json_option
@quiet_option
def copy(store: str, target: str, update: bool, as_json: bool, quiet: bool) -> None:
    """Copy a store's last commit into a new folder, also while another process writes. Sparse files stay sparse.

    \b
    Example:
      shardemb copy words.zarr backup.zarr
      shardemb copy words.zarr backup.zarr --update
    """
    with _refusals(), shardemb.open(store, mode="r") as opened:
        opened.copy(target, update=update, progress=not quiet)
    with _refusals(), shardemb.open(target, mode="r") as copied:
        facts = copied.info()
    _answer(f"{facts.path}: {formatting.size(facts.bytes_on_disk)}", asdict(facts), as_json=as_json)


@main.command()
@store_argument
@click.argument("head", type=click.Path())
@click.option(
    "--partitions", type=int, default=16, show_default=True, help="How many; it cannot be changed later."
)
@click.option("--folder", type=click.Path(), help="Where the partitions go; by default HEAD.partitions.")
@json_option
@quiet_option
def split(store: str, head: str, partitions: int, folder: str | None, as_json: bool, quiet: bool) -> None:
    """Make a distributed store with the tables of a store; interrupted, the same call goes on.

    The partitions can then be moved to the machines of their owners.

    \b
    Example:
      shardemb split words.zarr head.zarr --partitions 16
    """
    from shardemb import splitting

    with _refusals():
        commit = splitting.split(store, head, partitions=partitions, folder=folder, progress=not quiet)
    _answer(
        f"{head}: {partitions} partitions, commit {commit.id} at step {commit.step}",
        asdict(commit),
        as_json=as_json,
    )


@main.command()
@click.argument("head", type=click.Path())
@store_argument
@click.option("--folder", type=click.Path(), help="Where all partitions are now, if not where the head says.")
@json_option
@quiet_option
def merge(head: str, store: str, folder: str | None, as_json: bool, quiet: bool) -> None:
    """Make a store of one machine with the tables of a distributed store: the reverse of split.

    \b
    Example:
      shardemb merge head.zarr words.zarr
    """
    from shardemb import splitting

    with _refusals():
        commit = splitting.merge(head, store, folder=folder, progress=not quiet)
    _answer(f"{store}: commit {commit.id} at step {commit.step}", asdict(commit), as_json=as_json)


name_argument = click.argument("name")


@main.command()
@store_argument
@name_argument
@click.option("--replace", is_flag=True, help="Move a tag of this name, if there is one.")
@json_option
def tag(store: str, name: str, replace: bool, as_json: bool) -> None:
    """Keep the last commit under a name, until it is released.

    \b
    Example:
      shardemb tag words.zarr best --replace
    """
    with _refusals(), shardemb.open(store, mode="r+") as opened:
        commit = opened.tag(name, replace=replace)
    _answer(f"tag {name!r} keeps commit {commit.id} at step {commit.step}", asdict(commit), as_json=as_json)


@main.command()
@store_argument
@name_argument
def untag(store: str, name: str) -> None:
    """Keep a commit no longer.

    \b
    Example:
      shardemb untag words.zarr best
    """
    with _refusals(), shardemb.open(store, mode="r+") as opened:
        opened.untag(name)
    click.echo(f"released {name!r}")


@main.command()
@store_argument
@name_argument
@json_option
def restore(store: str, name: str, as_json: bool) -> None:
    """Go back to a commit that is kept, and commit that.

    \b
    Example:
      shardemb restore words.zarr best
    """
    with _refusals(), shardemb.open(store, mode="r+") as opened:
        commit = opened.restore(name)
    text = f"commit {commit.id} at step {commit.step}, as it was in {name!r}"
    _answer(text, asdict(commit), as_json=as_json)


@main.command("warm-up")
@quiet_option
def warm_up(quiet: bool) -> None:
    """Compile all kernels, so that no later process waits for it: for example while an image is built.

    They are kept where numba keeps compiled code: next to the package if that can be written, else in the user's cache;
    NUMBA_CACHE_DIR says another folder.

    \b
    Example:
      NUMBA_CACHE_DIR=/opt/kernels shardemb warm-up
    """
    from shardemb.warm_up import warm_up

    with _refusals():
        warm_up(progress=not quiet)


if __name__ == "__main__":
    main()
