"""The tests of durability, for hours: ``pytest -n 0 -m soak -s``. ``SHARDEMB_SOAK`` has their sizes (1.0: all of it).

Every seed is printed, and a seed alone repeats the workload (its folds run in a thread, so not always every state).
"""

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support import keys_power_loss as of_keys
from support.damages import damage_many
from support.failures import CHANGES, change_everywhere
from support.power_loss import (
    LEFT_OUT,
    OTHER_REASONS,
    SITES,
    found_without_barrier,
    found_without_call,
    is_about_keys,
)

SCALE = float(os.environ.get("SHARDEMB_SOAK", "1.0"))
FIRST_SEED = int(os.environ.get("SHARDEMB_SEED", str(random.SystemRandom().randrange(10**6))))
PIECES = 50

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]


def announce(what, seed, count):
    print(f"\nsoak: {what}, seed {seed}, {count}", flush=True)


@pytest.mark.parametrize("piece", range(PIECES))
@pytest.mark.parametrize("of", ["rows", "keys", "background", "fills", "fills beside commits"])
def test_loss_of_power(piece, of):
    from support import fills_power_loss
    from support.power_loss import explore, slow_commits, work, work_behind

    seed, states = FIRST_SEED + piece, int((1_000_000 if of == "rows" else 200_000) * SCALE / PIECES)
    announce(f"loss of power, {of}", seed, f"{states} different states")
    found, workloads = 0, 0  # the states of two workloads differ: their stores have different uuids
    work = {
        "rows": work,
        "keys": of_keys.work,
        "background": work_behind,
        "fills": fills_power_loss.work,
        "fills beside commits": fills_power_loss.work_behind,
    }[of]
    with pytest.MonkeyPatch.context() as patch:
        if of == "background":
            slow_commits(patch)
        while found < states:
            found += len(
                explore(
                    seed * 10_000 + workloads, min(states, 400), work=work, readers=of.startswith("fills")
                )
            )
            workloads += 1
    print(f"{found} different states of {workloads} workloads")


@pytest.mark.parametrize("piece", range(PIECES))
def test_crashes_within_recovery(piece, tmp_path):
    from support.recorded_calls import explore

    states = int(20_000 * SCALE / PIECES)
    announce("crashes within recovery, by system calls", FIRST_SEED + piece, f"{states} states")
    found = seed = 0
    while found < states:
        found += explore((FIRST_SEED + piece) * 1000 + seed, min(states, 100), tmp_path / "calls")
        seed += 1
    print(f"{found} different states of {seed} recoveries")


@pytest.mark.parametrize("piece", range(PIECES))
def test_failures(piece):
    from support.failures import fail_everywhere

    if piece >= max(1, 50 * SCALE):
        pytest.skip("not at this scale")
    announce("failures", FIRST_SEED + piece, "every position")
    assert fail_everywhere(FIRST_SEED + piece)


@pytest.mark.parametrize("piece", range(PIECES))
def test_failures_with_keys(piece):
    from support.keys_failures import fail_everywhere

    if piece >= max(1, 10 * SCALE):
        pytest.skip("not at this scale")
    announce("failures with keys", FIRST_SEED + piece, "every position")
    assert fail_everywhere(FIRST_SEED + piece)


@pytest.mark.parametrize("what", CHANGES)
def test_failures_of_changes(what):
    announce(f"failures of {what}", "none", "every position")
    assert change_everywhere(what)


@pytest.mark.parametrize("piece", range(PIECES))
def test_damage(piece):
    count = int(500_000 * SCALE / PIECES)
    announce("damage", FIRST_SEED + piece, count)
    print(damage_many(FIRST_SEED + piece, count))


@pytest.mark.parametrize("piece", range(PIECES))
def test_full_disks(piece, new_disk):
    from support.full_disks import fill_disks

    if piece >= max(2, 500 * SCALE):
        pytest.skip("not at this scale")
    new_disk("tmpfs", 2**20)  # or skip
    count = max(1, int(500 * SCALE / PIECES))
    first = FIRST_SEED + piece * count
    announce("full disks", first, f"{count} disks")
    print(dict(sum((fill_disks(first + number) for number in range(count)), Counter())))


def mutants():
    """Each call site and each barrier that is left out, and the function that finds a state without it."""
    return [
        *(
            (found_without_call, site)
            for site in SITES
            if site not in OTHER_REASONS and not is_about_keys(site)
        ),
        *((of_keys.found_without_call, site) for site in of_keys.NEEDED),
        *((found_without_barrier, what) for what in LEFT_OUT),
    ]


@pytest.mark.parametrize(("found_without", "what"), mutants(), ids=[what for _, what in mutants()])
def test_mutants(found_without, what):
    """Found within so many states, from a seed that no run before has tried."""
    states = max(8000, int(20_000 * SCALE))
    announce(f"without {what}", FIRST_SEED, f"up to {states} states")
    found = found_without(what, states=states, first_seed=FIRST_SEED, witness=None)
    print(found)
    assert found


@pytest.mark.parametrize(
    ("test", "counts"),
    [
        ("durability/test_killed_training.py", {"SHARDEMB_KILLS": 2000}),
        ("whole/test_fuzz.py", {"SHARDEMB_FUZZ_S": 3600}),
        (
            "whole/test_stateful.py",
            {"SHARDEMB_EXAMPLES": 5000, "SHARDEMB_EXAMPLE_STEPS": 100 / min(SCALE, 1.0)},
        ),
        (
            "whole/test_vocabulary_model.py",
            {"SHARDEMB_EXAMPLES": 2000, "SHARDEMB_EXAMPLE_STEPS": 60 / min(SCALE, 1.0)},
        ),
    ],
)
def test_others_for_longer(test, counts):
    settings = {name: str(max(1, round(count * SCALE))) for name, count in counts.items()}
    announce(test, FIRST_SEED, settings)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "-o",
        "timeout=0",
        f"--hypothesis-seed={FIRST_SEED}",
    ]
    command += [str(Path(__file__).parents[1] / test)]
    subprocess.run(command, env=os.environ | settings | {"SHARDEMB_SEED": str(FIRST_SEED)}, check=True)
