"""How much memory there is and how much is free, by files as the kernel has them."""

import os

import pytest

from shardemb.memory import memory_budget

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MIB = 2**20


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def machine(available_mib):
    return {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {available_mib * 1024} kB\nHugePages_Total: 0\n"}


def group_1(folder, limit, used, cached):
    return {
        f"sys/fs/cgroup/memory{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"sys/fs/cgroup/memory{folder}/memory.usage_in_bytes": f"{used}\n",
        f"sys/fs/cgroup/memory{folder}/memory.stat": (
            f"active_file 1\ntotal_active_file {cached}\ntotal_inactive_file {cached}\n"
        ),
    }


def group_2(folder, limit, used, cached):
    return {
        f"sys/fs/cgroup{folder}/memory.max": f"{limit}\n",
        f"sys/fs/cgroup{folder}/memory.current": f"{used}\n",
        f"sys/fs/cgroup{folder}/memory.stat": f"anon 5\nactive_file {cached}\ninactive_file {cached}\n",
    }


V1, V2 = "4:cpu,cpuacct:/x\n3:memory:/jobs/a\n0::/\n", "0::/jobs/a\n"
NO_LIMIT = 0x7FFFFFFFFFFFF000  # what version 1 says without one


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, MACHINE, 0),
        (machine(300), MACHINE, 300 * MIB),
        # Version 1: the group's own limit, without what is used but for copies of files.
        ({"proc/self/cgroup": V1, **machine(300), **group_1("/jobs/a", 100 * MIB, 60 * MIB, 10 * MIB)},
         100 * MIB, 60 * MIB),
        # That of a group around it is tighter.
        ({"proc/self/cgroup": V1, **machine(300), **group_1("/jobs/a", 100 * MIB, 0, 0),
          **group_1("/jobs", 90 * MIB, 80 * MIB, 0)}, 90 * MIB, 10 * MIB),
        ({"proc/self/cgroup": V1, **machine(300), **group_1("/jobs/a", NO_LIMIT, 5, 1)}, MACHINE, 300 * MIB),
        # In a container, only the top is there, whatever the path says.
        ({"proc/self/cgroup": V1, **machine(300), **group_1("", 50 * MIB, 20 * MIB, 0)}, 50 * MIB, 30 * MIB),
        ({"proc/self/cgroup": V2, **machine(300), **group_2("/jobs/a", 100 * MIB, 60 * MIB, 10 * MIB)},
         100 * MIB, 60 * MIB),
        ({"proc/self/cgroup": V2, **machine(300), **group_2("/jobs/a", "max", 60 * MIB, 0),
          **group_2("/jobs", 80 * MIB, 70 * MIB, 0)}, 80 * MIB, 10 * MIB),
        # More is used than is allowed, as after a limit was lowered.
        ({"proc/self/cgroup": V2, **machine(300), **group_2("/jobs/a", 10 * MIB, 60 * MIB, 0)}, 10 * MIB, 0),
        # The machine has less than the group may take.
        ({"proc/self/cgroup": V2, **machine(3), **group_2("/jobs/a", 100 * MIB, 60 * MIB, 0)}, 100 * MIB, 3 * MIB),
        ({"proc/self/cgroup": V1, **machine(300), "sys/fs/cgroup/memory/memory.limit_in_bytes": "nonsense"},
         MACHINE, 300 * MIB),
    ],
)  # fmt: skip
def test_memory_is_what_machine_and_control_groups_say(tmp_path, files, total, available):
    write(tmp_path, files)
    assert memory_budget.total_bytes(tmp_path) == total
    assert memory_budget.available_bytes(tmp_path) == available


def test_here_some_memory_is_free():
    assert 0 < memory_budget.available_bytes() <= memory_budget.total_bytes() <= MACHINE
