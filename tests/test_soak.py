"""The tests of durability, for hours: ``pytest -m soak -s``. Sizes are those of ``SHARDEMB_SOAK`` (1.0: all of it).

Every seed is printed, and a seed alone repeats the workload (its folds run in a thread, so not always every state).
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCALE = float(os.environ.get("SHARDEMB_SOAK", "1.0"))
FIRST_SEED = int(os.environ.get("SHARDEMB_SEED", str(random.SystemRandom().randrange(10**6))))
PIECES = 50

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]


def announce(what, seed, count):
    print(f"\nsoak: {what}, seed {seed}, {count}", flush=True)


@pytest.mark.parametrize("piece", range(PIECES))
def test_loss_of_power(piece):
    from test_power_loss import explore

    seed, states = FIRST_SEED + piece, int(1_000_000 * SCALE / PIECES)
    announce("loss of power", seed, f"{states} states")
    found = set()
    for number in range(max(1, states // 400)):
        found |= explore(seed * 10_000 + number, min(states, 400))
    print(f"{len(found)} different states")


@pytest.mark.parametrize("piece", range(PIECES))
def test_failures(piece):
    from test_failures import fail_everywhere

    if piece >= max(1, 50 * SCALE):
        pytest.skip("not at this scale")
    announce("failures", FIRST_SEED + piece, "every position")
    assert fail_everywhere(FIRST_SEED + piece)


@pytest.mark.parametrize("piece", range(PIECES))
def test_damage(piece, monkeypatch):
    import test_verify

    count = int(500_000 * SCALE / PIECES)
    monkeypatch.setattr(test_verify, "DAMAGES", count * test_verify.PARTS)
    announce("damage", FIRST_SEED + piece, count)
    print(test_verify.damage_many(FIRST_SEED + piece))


@pytest.mark.parametrize(
    ("test", "variable", "count"),
    [
        ("test_killed_training.py", "SHARDEMB_KILLS", 2000),
        ("test_fuzz.py", "SHARDEMB_FUZZ_S", 3600),
    ],
)
def test_others_for_longer(test, variable, count):
    announce(test, FIRST_SEED, f"{variable}={int(count * SCALE)}")
    settings = {variable: str(max(1, int(count * SCALE))), "SHARDEMB_SEED": str(FIRST_SEED)}
    command = [sys.executable, "-m", "pytest", "-q", "-o", "timeout=0", str(Path(__file__).with_name(test))]
    subprocess.run(command, env=os.environ | settings, check=True)
