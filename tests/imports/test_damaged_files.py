"""Files of every format, damaged in any way: a refusal that names the file, or rows; no crash, no hang, little memory.

With ``-m soak`` for a minute each, from a seed that is printed, which repeats it.
"""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from support.damaged_files import FILES, damage_many

from shardemb.imports import formats

SECONDS = float(os.environ.get("SHARDEMB_FUZZ_S", "60"))
SEED = int(os.environ.get("SHARDEMB_SEED", str(random.SystemRandom().randrange(10**6))))
NEEDED = {"torch": "torch", "hdf5": "h5py"}

every_format = pytest.mark.parametrize("form", FILES)


def require(form):
    if form in NEEDED and importlib.util.find_spec(NEEDED[form]) is None:
        pytest.skip(f"{NEEDED[form]} is not installed")


def test_every_format_is_among_them():
    assert set(formats.FORMATS) <= set(FILES)


@every_format
def test_some_damaged_files(tmp_path, form):
    require(form)
    assert sum(damage_many(form, 0.3, 0, tmp_path)) > 0


@pytest.mark.soak
@pytest.mark.timeout(0)
@every_format
def test_many_damaged_files(tmp_path, form):
    require(form)
    print(f"\nsoak: damaged files of {form}, seed {SEED}, {SECONDS:.0f} s", flush=True)
    command = [sys.executable, "-m", "support.damaged_files", form, str(SECONDS), str(SEED), str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr[-4000:]}\nthe file is in {tmp_path}"
    read, refused = map(int, done.stdout.split())
    print(f"{read} were read, {refused} refused")
    assert refused > 0
