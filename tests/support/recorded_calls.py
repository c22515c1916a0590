"""What a process does to a disk, from the system calls that strace has seen: nothing of the package takes part.

`support.power_loss` records the calls of the package's own functions; a call that goes past them it cannot see. Here
another process opens a store, and its calls become the same operations on the same simulated disk.
"""

import random
import re
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

import shardemb
from support import keys_power_loss as of_keys
from support import power_loss
from support.stores import close_quietly

CALLS = (
    "openat,openat2,creat,write,writev,pwrite64,pwritev,pwritev2,truncate,ftruncate,fallocate,copy_file_range,sendfile,"
    "rename,renameat,renameat2,link,linkat,unlink,unlinkat,rmdir,mkdir,mkdirat,symlink,symlinkat,"
    "fsync,fdatasync,sync_file_range,sync,syncfs,msync"
)
"""Every call that changes files, also those that the package is not known to use."""

ESCAPED = r"(?:\\x[0-9a-f]{2})*"
TEXT = rf'"({ESCAPED})"'

ROOT = -1
"""The inode number of the folder that the disk is mounted at."""


def recover(path, seed):
    """Open a store with the limits of a workload, and close it; a fold is part of that."""
    with pytest.MonkeyPatch.context() as patch:
        power_loss.lower_limits(patch, seed)
        close_quietly(shardemb.open(path, threads=1))


def trace_recovery(path, seed, output):
    """Do `recover` in a process that strace follows; return the lines."""
    program = f"from support.recorded_calls import recover; recover({str(path)!r}, {seed})"
    calls = ["-y", "-xx", "-s", str(2**24), "-e", f"trace={CALLS}", "-e", "signal=none", "-o", str(output)]
    done = subprocess.run(
        ["strace", "-f", *calls, sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("this process may not trace another")
    assert done.returncode == 0, done.stderr
    return output.read_text().splitlines()


def complete_calls(lines):
    """Name, arguments and result of each call, in the order of their ends."""
    started = {}
    for line in lines:
        thread, _, rest = line.partition(" ")
        rest = rest.lstrip()
        if (resumed := re.match(r"<\.\.\. \w+ resumed>", rest)) is not None:
            rest = started.pop(thread) + rest[resumed.end() :]
        elif rest.endswith("<unfinished ...>"):
            started[thread] = rest.removesuffix("<unfinished ...>")
            continue
        if (call := re.match(r"(\w+)\((.*)\) += (-?\d+)", rest)) is not None:
            yield call[1], call[2].rstrip(), int(call[3])


def operations_of(lines, root, disk):
    """Return what the calls did below a folder, as operations on the disk that the process found."""
    numbers, unused = dict(disk.names), count(-(10**12))
    numbers["."] = ROOT
    sizes = {number: len(data) for number, data in disk.data.items()}
    operations = []

    def new(operation, name):
        numbers[name] = next(unused)
        sizes[numbers[name]] = 0
        operations.append((operation, name, numbers[name]))

    def resize(number, nbytes):
        operations.append(("truncate", number, nbytes))
        sizes[number] = nbytes

    for call, arguments, result in complete_calls(lines):
        paths = _paths(call, arguments)
        if result < 0 or not any(path.is_relative_to(root) for path in paths):
            continue
        name, *more = (str(path.relative_to(root)) for path in paths)
        last = arguments.rsplit(", ", 2)
        if call in ("openat", "openat2"):
            assert re.search("O_TRUNC|O_TMPFILE", arguments) is None, arguments
            if "O_CREAT" in arguments and name not in numbers:
                new("create", name)
        elif call in ("renameat", "rename"):
            (target,) = more
            operations.append(("rename", name, target, numbers[name]))
            for each in [name, *(each for each in numbers if each.startswith(name + "/"))]:
                numbers[target + each[len(name) :]] = numbers.pop(each)
        elif call in ("linkat", "link"):
            numbers[more[0]] = numbers[name]
            operations.append(("link", more[0], numbers[name]))
        elif call in ("unlinkat", "unlink", "rmdir"):
            operations.append(("unlink", name))
            del numbers[name]
        elif call in ("mkdirat", "mkdir"):
            new("mkdir", name)
        elif call == "syncfs":
            operations.append(("sync all",))
        elif name not in numbers:
            assert name.endswith(" (deleted)"), f"{call} of {name}, which nothing has made"
        elif call in ("fsync", "fdatasync"):
            operations.append(("sync", numbers[name]))
        elif call == "pwrite64":
            data = bytes.fromhex(re.search(TEXT, arguments)[1].replace("\\x", ""))
            assert len(data) == result
            operations.append(("write", numbers[name], int(last[-1]), data))
            sizes[numbers[name]] = max(sizes[numbers[name]], int(last[-1]) + result)
        elif call == "ftruncate":
            resize(numbers[name], int(last[-1]))
        elif call == "fallocate" and "KEEP_SIZE" not in arguments:
            resize(numbers[name], max(sizes[numbers[name]], int(last[-2]) + int(last[-1])))
        else:
            assert call == "fallocate", f"{call}({arguments}) is not known here"
            assert "PUNCH_HOLE" not in arguments, arguments
    return operations


def _paths(call, arguments):
    """Return the paths of a call: names, within open folders or not, or that of its descriptor."""
    if re.search(r"at2?$", call):
        within = re.findall(rf"(?:\d+<({ESCAPED})>|AT_FDCWD(?:<[^>]*>)?), {TEXT}", arguments)
        return [Path(_decoded(folder) or "/") / _decoded(name) for folder, name in within]
    if (descriptor := re.match(rf"\d+<({ESCAPED})>", arguments)) is not None:
        return [Path(_decoded(descriptor[1]))]
    return [Path(_decoded(each)) for each in re.findall(TEXT, arguments)]


def _decoded(escaped):
    return bytes.fromhex(escaped.replace("\\x", "")).decode("utf-8", "surrogateescape")


def explore(seed, number_of_states, output, *, left_out=()):
    """Let a workload crash, recover in a process that is traced, and crash that; return how many states differed.

    The first state that does not open at the last commit is an AssertionError. Operations whose kind is `left_out` are
    as if the process had not asked for them.
    """
    chance, seen = random.Random(seed), set()
    work = chance.choice([power_loss.work, of_keys.work])
    with power_loss.scratch() as folder, pytest.MonkeyPatch.context() as patch:
        power_loss.lower_limits(patch, seed)
        first, second = Path(folder).resolve() / "first", Path(folder).resolve() / "second"
        first.mkdir()
        second.mkdir()
        recording = power_loss.Recording(first)
        with recording.on():
            work(first / "store", seed, recording)
        disk, (point,) = power_loss.Disk(), recording.points(chance, 1)
        for operation in recording.operations[:point]:
            disk.apply(*operation)
        if chance.random() < 0.5:  # the process was killed, and much of what it wrote is not durable
            state, numbers = disk.killed()
            power_loss.materialise(state, second, numbers)
            seen_by_process, disk = power_loss.Disk.of(second), disk.moved(numbers, second)
        else:
            power_loss.materialise(disk.crash(chance), second)
            seen_by_process = disk = power_loss.Disk.of(second)
        disk.kinds[ROOT] = "folder"
        operations = operations_of(trace_recovery(second / "store", seed, output), second, seen_by_process)
        done, allowed = 0, power_loss.allowed_at(recording, point)
        for moment in sorted(chance.choices(range(len(operations) + 1), k=number_of_states)):
            for operation in operations[done:moment]:
                if operation[0] not in left_out:
                    disk.apply(*operation)
            done, state = moment, disk.crash(chance)
            if (key := power_loss.digest(state)) not in seen:
                seen.add(key)
                problem = power_loss.check(state, allowed, chance, seen, again=False, skip=None)
                assert problem is None, f"seed {seed}, call {moment} of the recovery: {problem}"
    return len(seen)
