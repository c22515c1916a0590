"""Segments of the log, read and rewritten by the text of the format."""

import struct

import xxhash

HEADER = struct.Struct("<8s QQQQQ 16s 16s Q")


RECORD = struct.Struct("<4sIQQQQQQ16sQQ")


def digest(data):
    return xxhash.xxh3_64_intdigest(data)


def independent(path):
    """Header of a segment, and its records as ``(offset, fields, payload)``."""
    data = path.read_bytes()
    header = HEADER.unpack_from(data)
    assert header[-1] == digest(data[: HEADER.size - 8])
    records, position = [], 4096
    while position < header[5] and data[position : position + 4] == b"srec":
        head = data[position : position + RECORD.size]
        fields = RECORD.unpack(head)
        assert fields[-1] == digest(header[6] + header[7] + head[:-8])
        payload = data[position + RECORD.size : position + RECORD.size + fields[2]]
        assert fields[-2] == digest(payload)
        records.append((position, fields, payload))
        position += -(-(RECORD.size + fields[2]) // 4096) * 4096
    return header, records


def rewrite(path, position, payload=None, **changes):
    """Replace a record by one that says something else, with right checksums."""
    header, records = independent(path)
    names = [
        "magic",
        "kind",
        "length",
        "epoch",
        "sequence",
        "synced",
        "attempt",
        "count",
        "table",
        "payload_sum",
        "sum",
    ]
    _, fields, old = next(each for each in records if each[0] == position)
    payload = old if payload is None else payload
    values = dict(zip(names, fields, strict=True)) | {"length": len(payload), "payload_sum": digest(payload)}
    values |= changes
    packed = RECORD.pack(*values.values())[:-8]
    packed += digest(header[6] + header[7] + packed).to_bytes(8, "little")
    with path.open("r+b") as file:
        file.seek(position)
        file.write(packed + payload)
