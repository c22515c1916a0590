"""The limits of the machine, measured before anything is compared with them."""

import json
import mmap
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

PAGE = 4096
COPIED = 64 * 2**20
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Machine:
    """The constants that limits are computed from."""

    cores: int
    memory_bytes: int
    linux: str
    copy_bytes_per_s: float
    """Bytes per second that all cores together copy from memory to memory; each byte counts once."""
    read_pages_per_s: float
    """Random reads of 4 KiB, many at a time."""
    reader: str
    """What measured this: fio with io_uring, or threads of this program."""
    write_bytes_per_s: float
    """A single sequential writer past the page cache."""
    sync_s: float
    """Median of `fdatasync` after 4 KiB were appended to a file."""


def calibrate(folder, scale=1.0):
    """Measure this machine, and the disk that `folder` is on."""
    folder = Path(folder)
    file = folder / "calibration"
    write_speed = _sequential_writes(file, max(2**26, int(2**31 * scale)))
    reads, reader = random_reads(file, 3.0 if scale >= 0.5 else 0.5)
    file.unlink()
    return Machine(
        cores=CORES,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        linux=os.uname().release,
        copy_bytes_per_s=_copies(),
        read_pages_per_s=reads,
        reader=reader,
        write_bytes_per_s=write_speed,
        sync_s=_syncs(folder / "synced"),
    )


def _copies():
    """All cores copy concurrently; the best of several rounds, because only noise makes a round slower."""
    pairs = [(np.ones(COPIED, np.uint8), np.ones(COPIED, np.uint8)) for _ in range(CORES)]
    rates = []
    with ThreadPoolExecutor(CORES) as pool:
        for _ in range(10):
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), pairs))
            rates.append(CORES * COPIED / (time.perf_counter() - start))
    return max(rates)


def _sequential_writes(file, nbytes):
    block = mmap.mmap(-1, 2**23)
    block.write(np.random.default_rng(0).bytes(len(block)))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        descriptor = os.open(file, flags | os.O_DIRECT)
    except OSError:  # not every file system has O_DIRECT
        descriptor = os.open(file, flags)
    start = time.perf_counter()
    for _ in range(nbytes // len(block)):
        os.write(descriptor, block)
    os.fdatasync(descriptor)
    elapsed = time.perf_counter() - start
    os.close(descriptor)
    return nbytes // len(block) * len(block) / elapsed


def _syncs(file):
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    times = []
    for _ in range(50):
        os.write(descriptor, bytes(PAGE))
        start = time.perf_counter()
        os.fdatasync(descriptor)
        times.append(time.perf_counter() - start)
    os.close(descriptor)
    file.unlink()
    return float(np.median(times))


# ---- random reads -------------------------------------------------------------------------------------------------


def random_reads(file, seconds):
    """Return the random 4 KiB reads per second past the page cache, and what measured them."""
    if shutil.which("fio"):
        try:
            return _fio(file, seconds), "fio, io_uring, depth 64, 2 jobs"
        except (subprocess.CalledProcessError, ValueError, KeyError):
            pass  # no io_uring here, or no O_DIRECT
    return _own_reads(file, seconds), "64 threads of preadv"


def _fio(file, seconds):
    options = {
        "name": "reads",
        "filename": file,
        "rw": "randread",
        "bs": PAGE,
        "ioengine": "io_uring",
        "iodepth": 64,
        "numjobs": 2,
        "direct": 1,
        "runtime": f"{int(1000 * seconds)}ms",
        "output-format": "json",
    }
    flags = ["--time_based", "--group_reporting", "--randrepeat=0", "--norandommap"]
    command = ["fio", *(f"--{key}={value}" for key, value in options.items()), *flags]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(answer[answer.index("{") :])["jobs"][0]["read"]["iops"])


def _own_reads(file, seconds):
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    pages = os.fstat(descriptor).st_size // PAGE
    end = threading.Event()
    with ThreadPoolExecutor(64) as pool:
        counts = [pool.submit(partial(_read_until, end, descriptor, pages, seed)) for seed in range(64)]
        time.sleep(seconds)
        end.set()
        total = sum(count.result() for count in counts)
    os.close(descriptor)
    return total / seconds


def _read_until(end, descriptor, pages, seed):
    buffer, random, count = mmap.mmap(-1, PAGE), np.random.default_rng(seed), 0
    while not end.is_set():
        os.preadv(descriptor, [buffer], int(random.integers(pages)) * PAGE)
        count += 1
    return count
