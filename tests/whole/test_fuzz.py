"""Files full of nonsense: nothing hangs, nothing crashes, little memory, and only errors of shardemb's own."""

import contextlib
import json
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from support.log_files import independent, rewrite
from support.power_loss import scratch
from support.stores import close_quietly

import shardemb
from shardemb.commits import log_reader
from shardemb.errors import FormatError
from shardemb.format import documents, store_paths, zarr_metadata
from shardemb.format.manifest import Manifest
from shardemb.optim import Adam
from shardemb.storage import folders

SECONDS = float(os.environ.get("SHARDEMB_FUZZ_S", "6"))
SEED = int(os.environ.get("SHARDEMB_SEED", "0"))
NUMBERS = [0, 1, 2, 7, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1]
FIELDS = ["kind", "length", "epoch", "sequence", "synced", "attempt", "count"]


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def a_crashed_store(folder):
    """A store with a log of several segments and records."""
    live = folder / "live"
    store = shardemb.open(live, log_bytes=2**30)
    table = store.create_table("t", num_embeddings=500, embedding_dim=8, optimizer=Adam())
    store.commit()
    for step in range(6):
        table.update(np.arange(step * 20, step * 30 + 5), np.ones((step * 10 + 5, 8), np.float32))
        store.commit(step=step)
    shutil.copytree(live, folder / "crashed")
    close_quietly(store)
    return folder / "crashed"


def nonsense(path, chance):
    """Damage a segment: bytes anywhere, or numbers that lie, with checksums that are right."""
    if chance.random() < 0.6:
        _, records = independent(path)
        position, _fields, payload = chance.choice(records)
        what = chance.choice([*FIELDS, "payload"])
        if what == "payload":
            data = bytearray(payload)
            for _ in range(chance.choice([1, 3, 30])):
                if data:
                    data[chance.randrange(len(data))] = chance.randrange(256)
            rewrite(
                path,
                position,
                bytes(data[: chance.randrange(len(data) + 1)] if chance.random() < 0.3 else data),
            )
        else:
            limit = 2**32 if what == "kind" else 2**64
            rewrite(path, position, **{what: chance.choice([n for n in NUMBERS if n < limit])})
        return
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 2, 20])):
        data[chance.randrange(len(data))] = chance.randrange(256)
    if chance.random() < 0.2:
        del data[chance.randrange(len(data)) :]
    path.write_bytes(data)


@pytest.mark.slow
def test_the_log_reader():
    chance = random.Random(SEED)
    with scratch() as folder:
        crashed = a_crashed_store(Path(folder))
        base = Manifest.from_bytes(store_paths.manifest(crashed).read_bytes())
        spec = zarr_metadata.table_spec(folders.documents(crashed / "t"))
        sound = store_paths.log(crashed)
        paths = sorted(sound.glob("*.log"))
        copy, count, refused = Path(folder) / "log", 0, 0
        before, until = resident_bytes(), time.monotonic() + SECONDS
        while time.monotonic() < until:
            count += 1
            shutil.copytree(sound, copy)
            for path in chance.sample(paths, chance.choice([1, min(2, len(paths))])):
                nonsense(copy / path.name, chance)
            started = time.monotonic()
            try:
                found = log_reader.read(copy, base)
                images = found.images(spec)
                assert images.ids.size == images.addresses.size <= 500
            except FormatError:  # LogDamagedError is one
                refused += 1
            assert time.monotonic() - started < 5
            shutil.rmtree(copy)
        assert resident_bytes() - before < 200e6
        assert 0 < refused < count


def mutate(value, chance):
    """Another JSON value, near this one or far from it."""
    others = [
        None,
        True,
        -1,
        0,
        1,
        0.5,
        1e308,
        2**63,
        10**30,
        "",
        "x" * 1000,
        "../up",
        [],
        {},
        [[[[[]]]]],
        {"a": {}},
    ]
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        if chance.random() < 0.1:
            return {each: value[each] for each in value if each != key}
        return value | {key: mutate(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], mutate(value[at], chance), *value[at + 1 :]]
    if isinstance(value, int) and chance.random() < 0.5:
        return chance.choice([value + 1, -value, value * 2**40, *NUMBERS])
    return chance.choice(others)


def seal(document):
    """Give a table's attributes the checksum that belongs to them, where they are still an object."""
    with contextlib.suppress(TypeError, KeyError, IndexError, AttributeError):
        attributes = document["attributes"]["shardemb"]
        attributes["crc32"] = documents.crc32(attributes)


@pytest.mark.slow
def test_the_metadata_readers():
    chance = random.Random(SEED)
    with scratch() as folder:
        crashed = a_crashed_store(Path(folder))
        document = json.loads(store_paths.manifest(crashed).read_bytes())
        found = {name: json.loads(data) for name, data in folders.documents(crashed / "t").items()}
    before, until = resident_bytes(), time.monotonic() + SECONDS
    counts = {"accepted": 0, "refused": 0}
    while time.monotonic() < until:
        try:
            if chance.random() < 0.5:
                changed = mutate(document, chance)
                if isinstance(changed, dict):
                    changed["crc32"] = documents.crc32(changed)
                Manifest.from_bytes(json.dumps(changed).encode())
            else:
                name = chance.choice(list(found))
                changed = found | {name: mutate(found[name], chance)}
                if chance.random() < 0.5:  # a hostile table has the right checksum
                    seal(changed[zarr_metadata.DOCUMENT])
                data = {name: json.dumps(each).encode() for name, each in changed.items()}
                if chance.random() < 0.1:
                    data[name] = data[name][: chance.randrange(len(data[name]))] or b"[" * 100_000
                zarr_metadata.table_spec(data)
            counts["accepted"] += 1
        except FormatError:
            counts["refused"] += 1
    assert resident_bytes() - before < 200e6
    assert min(counts.values()) > 0
