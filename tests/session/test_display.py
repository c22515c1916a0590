"""Descriptions of stores and tables: one line, for a terminal, for a notebook."""

import dataclasses
from html.parser import HTMLParser

import pytest

from shardemb.base.formatting import plural, size
from shardemb.format.manifest import Commit
from shardemb.session import display
from shardemb.session.display import Facts, StoreInfo, describe, html_table, one_line

FACTS = Facts(
    name="tokens",
    num_embeddings=400_000,
    embedding_dim=128,
    optimizer="Adam(lr=0.001)",
    initializer="Constant(value=0.0)",
    step=1234,
    state_columns=("exp_avg", "exp_avg_sq"),
    rows_per_shard=65_536,
    num_shards=7,
    nbytes=614_400_000,
    changed_rows=0,
    row_bytes=1536,
)


def facts(**changes):
    return dataclasses.replace(FACTS, **changes)


# ---- one line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({}, "7 shards"),
        ({"changed_rows": 1}, "7 shards, 1 changed row not committed"),
        ({"changed_rows": 5000, "num_shards": 1}, "1 shard, 5,000 changed rows not committed"),
        ({"changed_rows": None}, "7 shards, closed"),
    ],
)
def test_one_line(changes, end):
    assert (
        one_line(facts(**changes))
        == f"Table 'tokens': 400,000 x 128 float32, Adam(lr=0.001), step 1,234, {end}"
    )


# ---- for a terminal ---------------------------------------------------------------------------------------------


def info(**changes):
    return StoreInfo(
        **{
            "path": "/s",
            "uuid": "u",
            "commit": None,
            "bytes_on_disk": 1536,
            "tables": (facts(bytes_on_disk=4096),),
        }
        | changes
    )


def test_describe_a_store():
    assert describe(info(commit=Commit(3, 100, {"loss": 0.5}))).splitlines() == [
        "Store   /s",
        "Commit  3 at step 100",
        "Disk    1.5 KiB",
        'Job     {"loss": 0.5}',
        "",
        "Table   tokens",
        "  rows         400,000 x 128 float32, 1,536 bytes each with state",
        "  optimizer    Adam(lr=0.001), step 1,234",
        "  state        exp_avg, exp_avg_sq",
        "  initializer  Constant(value=0.0)",
        "  shards       7 of 65,536 rows",
        "  size         585.9 MiB, 4.0 KiB on disk",
    ]


def test_describe_an_empty_store():
    assert describe(info(tables=())).splitlines() == ["Store   /s", "Commit  none yet", "Disk    1.5 KiB"]


def test_describe_a_table_without_state():
    text = describe(info(tables=(facts(state_columns=(), optimizer="no optimizer"),)))
    assert "  state        none" in text
    assert "0 B on disk" in text


# ---- for a notebook ---------------------------------------------------------------------------------------------


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.rows, self.open, self.caption = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] == "caption":
            self.caption += data
        else:
            self.rows[-1][-1] += data


def test_a_table_of_tables():
    cells = Cells(html_table([facts(), facts(name="users", changed_rows=None)], "Store '/s'"))
    assert cells.caption == "Store '/s'"
    assert cells.rows == [
        ["table", "rows", "dim", "optimizer", "step", "shards", "size", "changed rows"],
        ["tokens", "400,000", "128", "Adam(lr=0.001)", "1,234", "7", "585.9 MiB", "0"],
        ["users", "400,000", "128", "Adam(lr=0.001)", "1,234", "7", "585.9 MiB", "closed"],
    ]


def test_no_tables_and_no_caption():
    cells = Cells(html_table([]))
    assert len(cells.rows) == 1
    assert cells.caption == ""


def test_names_are_escaped_in_html():
    text = html_table([facts(optimizer="<script>alert(1)</script>")], "/tmp/<b>&")
    assert "<script>" not in text
    assert Cells(text).caption == "/tmp/<b>&"


# ---- the parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1024, "1,024 rows")]
)
def test_plural(count, text):
    assert plural(count, "row") == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20, "1.0 MiB"),
        (2**30 * 5, "5.0 GiB"),
        (2**40, "1.0 TiB"),
        (2**50, "1.0 PiB"),
        (2**64, "16384.0 PiB"),
    ],
)
def test_size(nbytes, text):
    assert size(nbytes) == text


def test_every_description_is_plain_text():
    assert all(isinstance(value, str) for value in (one_line(FACTS), html_table([FACTS]), describe(info())))
    assert "\n" not in one_line(FACTS)
    assert display.__doc__
