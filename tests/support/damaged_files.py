"""Valid files of every format that is imported, damaged byte by byte: each is refused by name, or gives rows.

Run as a program, ``python -m support.damaged_files FORMAT SECONDS SEED FOLDER``, it damages files of one format until
the time is over, and prints how many were read and how many refused. So whatever a parser of C does to the process, the
file that did it is in the folder.
"""

import faulthandler
import gzip
import io
import random
import resource
import shutil
import struct
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from shardemb.errors import SourceError
from shardemb.imports.blocks import ReadOptions
from shardemb.imports.formats import open_source
from support.vector_files import model_of_fasttext, read

DIM, ROWS = 6, 40
HANGS_S = 20.0
"""A file of a few kilobytes that takes longer is taken for one that is never read."""

MEMORY, OF_PARQUET = 256 * 2**20, 2304 * 2**20
"""Most bytes that all these files together may add to the memory of the process. pyarrow believes what the header of a
page of parquet says about its size, which is less than 2 GiB."""

NUMBERS = [
    0,
    1,
    2,
    0x7F,
    0xFF,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


# ---- valid files ------------------------------------------------------------------------------------------------


def _rows():
    return np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)


def _words():
    return [f"word{number}" * (number % 3 + 1) for number in range(ROWS - 2)] + ["ä", "東京"]


def _lines(separator=" "):
    pairs = zip(_words(), _rows(), strict=True)
    return "".join(separator.join([word, *map(str, row.tolist())]) + "\n" for word, row in pairs).encode()


def _word2vec_text():
    return f"{ROWS} {DIM}\n".encode() + _lines()


def _word2vec_binary():
    pairs = zip(_words(), _rows(), strict=True)
    return f"{ROWS} {DIM}\n".encode() + b"".join(
        word.encode() + b" " + row.tobytes() + b"\n" for word, row in pairs
    )


def _fasttext_binary():
    matrix = np.random.default_rng(0).normal(size=(ROWS + 20, DIM)).astype(np.float32)
    return model_of_fasttext([word.encode() for word in _words()], matrix)


def _npy():
    target = io.BytesIO()
    np.save(target, _rows())
    return target.getvalue()


def _npz():
    target = io.BytesIO()
    np.savez_compressed(target, vectors=_rows(), bias=np.zeros(3))
    return target.getvalue()


def _safetensors():
    header = b'{"w":{"dtype":"F32","shape":[%d,%d],"data_offsets":[0,%d]},"__metadata__":{"format":"pt"}}'
    header %= (ROWS, DIM, 4 * ROWS * DIM)
    return struct.pack("<Q", len(header)) + header + _rows().tobytes()


def _gguf():
    def text(value):
        return struct.pack("<Q", len(value)) + value

    words = b"".join(text(word.encode()) for word in _words())
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
    head += text(b"general.name") + struct.pack("<I", 8) + text(b"a model")
    head += text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, ROWS) + words
    head += text(b"token_embd.weight") + struct.pack("<IQQIQ", 2, DIM, ROWS, 0, 0)
    return head + b"\0" * (-len(head) % 32) + _rows().tobytes()


def _table():
    import pyarrow as pa

    vectors = pa.FixedSizeListArray.from_arrays(_rows().reshape(-1), DIM)
    return pa.table({"key": _words(), "embedding": vectors})


def _parquet():
    from pyarrow import parquet

    target = io.BytesIO()
    parquet.write_table(_table(), target, row_group_size=15)
    return target.getvalue()


def _arrow():
    import pyarrow as pa

    target, table = io.BytesIO(), _table()
    with pa.ipc.new_file(target, table.schema) as writer:
        writer.write_table(table, 15)
    return target.getvalue()


def _torch():
    import torch

    target = io.BytesIO()
    torch.save({"embedding.weight": torch.from_numpy(_rows()), "bias": torch.zeros(3)}, target)
    return target.getvalue()


def _hdf5():
    import h5py

    target = io.BytesIO()
    with h5py.File(target, "w") as file:
        file.create_dataset("vectors", data=_rows(), chunks=(15, DIM), compression="gzip")
    return target.getvalue()


def _zarr(path):
    import zarr

    array = zarr.create_array(path, shape=(ROWS, DIM), chunks=(15, DIM), dtype="float32")
    array[:] = _rows()


FILES = {
    "word2vec-text": _word2vec_text,
    "word2vec-binary": _word2vec_binary,
    "glove": _lines,
    "fasttext-text": _word2vec_text,
    "fasttext-binary": _fasttext_binary,
    "npy": _npy,
    "npz": _npz,
    "safetensors": _safetensors,
    "gguf": _gguf,
    "parquet": _parquet,
    "arrow": _arrow,
    "torch": _torch,
    "hdf5": _hdf5,
    "zarr": None,  # a folder
    "gzip": lambda: gzip.compress(_word2vec_binary()),
}
"""How to make a valid file of each format, and of what else is read on the way to it."""

OF_WORDS = {"word2vec-text", "word2vec-binary", "glove", "fasttext-text", "fasttext-binary"}
"""Formats in which a number that is not finite is a mistake; arrays keep their bits."""

CALLED = {"npz": "npy", "gzip": "word2vec-binary"}


# ---- damaging them ----------------------------------------------------------------------------------------------


def damaged(data, chance):
    """Return bytes with a few changes: other bytes, numbers that lie, parts that are gone, twice there or new."""
    found = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4])):
        # Headers and footers are where lies are told.
        at = chance.choice([chance.randrange(len(found) + 1), min(len(found), chance.randrange(200))])
        at = chance.choice([at, at, max(0, len(found) - chance.randrange(200))])
        length = chance.choice([1, 1, 2, 4, 8, 30])
        what = chance.randrange(6)
        if what == 0:
            found[at : at + 1] = bytes([chance.randrange(256)])
        elif what == 1:
            size = chance.choice([1, 2, 4, 8])
            found[at : at + size] = (chance.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
        elif what == 2:
            del found[at : at + length]
        elif what == 3:
            found[at:at] = found[at : at + length]
        elif what == 4:
            found[at:at] = bytes(chance.randrange(256) for _ in range(length))
        else:
            found = found[:at] if chance.random() < 0.3 else found
            found[at : at + length] = chance.choice(
                [b"9" * length, b" " * length, b"\n" * length, b"\xff" * length]
            )
    return bytes(found)


def _damage_folder(sound, path, chance):
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(sound, path)
    file = chance.choice(sorted(each for each in path.rglob("*") if each.is_file()))
    file.write_bytes(damaged(file.read_bytes(), chance))


def read_or_refused(path, form):
    """Read a file; return whether it is one, or raise for whatever is neither rows nor a refusal by name."""
    try:
        with open_source(path, form, ReadOptions(unicode_errors="strict")) as source:
            keys, rows = read(source)
    except SourceError as error:
        if path.name not in str(error):
            msg = f"the refusal does not name the file: {error}"
            raise AssertionError(msg) from error
        return False
    assert np.isfinite(rows).all() or form not in OF_WORDS
    assert len(keys) in (0, len(rows))
    return True


def peak_bytes():
    """Return the largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def damage_many(form, seconds, seed, folder):
    """Damage a file again and again; return how many were read and how many refused."""
    chance, called = random.Random(seed), CALLED.get(form, form)
    path, counts = folder / f"damaged.{form}", {True: 0, False: 0}
    sound = folder / "sound"
    if FILES[form] is None:
        _zarr(sound)
    else:
        sound.write_bytes(FILES[form]())
    assert read_or_refused(sound, called)
    before, until = peak_bytes(), time.monotonic() + seconds
    while time.monotonic() < until:
        if FILES[form] is None:
            _damage_folder(sound, path, chance)
        else:
            path.write_bytes(damaged(sound.read_bytes(), chance))
        faulthandler.dump_traceback_later(HANGS_S, exit=True)
        guessed = None if chance.random() < 0.1 else called
        counts[read_or_refused(path, guessed)] += 1
        faulthandler.cancel_dump_traceback_later()
        assert peak_bytes() - before < (OF_PARQUET if form == "parquet" else MEMORY), "too much memory"
    return counts[True], counts[False]


if __name__ == "__main__":
    warnings.simplefilter("error")  # as in tests
    print(*damage_many(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
