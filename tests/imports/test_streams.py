"""Files of callers: what is decompressed, what is refused, and how far reading has come."""

import bz2
import errno
import gzip
import io
import lzma
import os
import random

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardemb.errors import SourceError
from shardemb.imports import streams

DATA = random.Random(0).randbytes(300_000) + bytes(700_000)


def zstd(data):
    return pa.compress(data, "zstd", asbytes=True)


PACK = {None: bytes, "gzip": gzip.compress, "bz2": bz2.compress, "zstd": zstd}


def everything(stream, nbytes=70_001):
    parts = []
    while data := stream.peek(nbytes):
        parts.append(data)
        stream.skip(len(data))
    return b"".join(parts)


# ---- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", PACK)
def test_a_file_is_decompressed_whatever_its_name_is(tmp_path, compression):
    path = tmp_path / "a.xz"
    path.write_bytes(PACK[compression](DATA))
    with streams.open_stream(str(path)) as stream:
        assert (stream.name, stream.compression, stream.size) == (str(path), compression, path.stat().st_size)
        assert (stream.position, stream.peek(10), stream.position) == (0, DATA[:10], 0)
        assert everything(stream) == DATA
        assert stream.position == len(DATA)
        assert stream.consumed == stream.size


@pytest.mark.parametrize("compression", ["gzip", "bz2", "zstd"])
def test_parts_that_were_compressed_one_by_one_are_one_file(tmp_path, compression):
    path = tmp_path / "a"
    path.write_bytes(
        b"".join(PACK[compression](DATA[start : start + 250_000]) for start in range(0, 10**6, 250_000))
    )
    with streams.open_stream(path) as stream:
        assert everything(stream) == DATA


@settings(max_examples=30)
@given(steps=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=20), packed=st.booleans())
def test_looking_ahead_and_passing_over(tmp_path_factory, steps, packed):
    data = bytes(range(200))
    path = tmp_path_factory.mktemp("stream") / "a"
    path.write_bytes(gzip.compress(data) if packed else data)
    at = 0
    with streams.open_stream(path) as stream:
        for ahead, over in steps:
            seen = stream.peek(ahead)
            assert seen == data[at : at + ahead]
            stream.skip(min(over, len(seen)))
            at += min(over, len(seen))
            assert stream.position == at


def test_progress_is_that_of_the_compressed_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(DATA))
    with streams.open_stream(path) as stream:
        seen = [stream.consumed]
        while data := stream.peek(50_000):
            stream.skip(len(data))
            seen.append(stream.consumed)
        assert seen == sorted(seen)
        assert 0 < seen[1] < seen[-1] == stream.size


def test_what_expands_without_end_takes_no_memory(tmp_path):
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(bytes(2**26)))
    before = pa.total_allocated_bytes()
    with streams.open_stream(path) as stream:
        assert stream.peek(2**16) == bytes(2**16)
        assert pa.total_allocated_bytes() - before < 2**22


def test_a_mapped_file_outlives_its_stream(tmp_path):
    path = tmp_path / os.fsdecode(b"a\xff")  # a name that is no UTF-8
    path.write_bytes(DATA)
    with streams.open_stream(path) as stream:
        view = stream.mapped()
    path.unlink()
    assert view == DATA
    path.touch()
    with streams.open_stream(path) as stream:
        assert len(stream.mapped()) == 0


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_what_is_no_file_is_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # nobody ever opens the other end
    with pytest.raises(SourceError, match=f"{pipe}: is no regular file"):
        streams.open_stream(pipe)
    with pytest.raises(SourceError, match=f"{tmp_path}: is a folder"):
        streams.open_stream(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        streams.open_stream(tmp_path / "absent")
    with pytest.raises(ValueError, match="a file to import must be on a local disk"):
        streams.open_stream("https://example.org/glove.txt")
    with pytest.raises(TypeError, match="a file to import must be given as a path"):
        streams.open_stream(7)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_refused(tmp_path):
    path = tmp_path / "a"
    path.touch(mode=0)
    with pytest.raises(PermissionError, match=str(path)):
        streams.open_stream(path)


@pytest.mark.parametrize("compression", ["gzip", "bz2", "zstd"])
def test_what_is_cut_off_or_damaged_is_refused(tmp_path, compression):
    path, packed = tmp_path / "a", PACK[compression](DATA)
    damaged = packed[:9000] + b"zzzzzz" + packed[9006:]
    for broken in (
        packed[:-10],
        packed[: len(packed) // 2],
        *[damaged] * (compression != "zstd"),
    ):  # it has no checksum
        path.write_bytes(broken)
        with (
            streams.open_stream(path) as stream,
            pytest.raises(SourceError, match=r"a, before byte [\d,]+: cannot"),
        ):
            everything(stream)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_failing_disk_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch, pack):
    path = tmp_path / "a"
    path.write_bytes(pack(DATA))

    class Failing(io.FileIO):
        def read(self, nbytes=-1):
            if self.tell() >= 2**16:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(min(nbytes, 2**16))

    monkeypatch.setattr(streams, "open", lambda path, *_, **__: Failing(path), raising=False)
    with streams.open_stream(path) as stream, pytest.raises(OSError, match="Input/output error") as caught:
        everything(stream)
    assert caught.value.errno == errno.EIO


def test_what_is_compressed_cannot_be_mapped(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(DATA))
    with streams.open_stream(path) as stream, pytest.raises(SourceError, match="is compressed with gzip"):
        stream.mapped()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (lzma.compress(DATA), "compressed with xz"),
        (b"PK\3\4" + DATA, "a zip archive"),
        (b"\x04\x22\x4d\x18" + DATA, "compressed with lz4"),
        (b"7z\xbc\xaf\x27\x1c" + DATA, "an archive"),
    ],
)
def test_what_others_have_to_unpack_is_refused_with_a_way_out(tmp_path, data, what):
    path = tmp_path / "a"
    path.write_bytes(data)
    with streams.open_stream(path) as stream, pytest.raises(SourceError, match=f"is {what}.*first"):
        streams.refuse_packed(stream)


def test_a_file_is_closed_where_opening_it_fails(tmp_path):
    path = tmp_path / "a"
    path.touch()
    with pytest.raises(KeyError), streams.opening(path) as stream:
        raise KeyError
    with pytest.raises(ValueError, match="closed"):
        stream.peek(1)
    with streams.opening(path) as stream:
        pass
    assert stream.peek(1) == b""
    stream.close()
