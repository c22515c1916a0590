"""A real file system, small and full: calls are refused by name, nothing is lost, and with room everything goes on.

A store lives several lives on one small disk, ext4 or a tmpfs, beside a model in NumPy. A file takes up more or less
of the room, so that the disk is full while tables are created, commits are logged, folds are written, pages leave
memory or a store is recovered. A life ends with `close` or with the death of the process, at any operation on files.
"""

import pytest
from support.full_disks import DISKS, fill_disks


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(DISKS))
def test_a_store_lives_on_a_full_disk(seed, new_disk, elsewhere):
    new_disk("tmpfs", 2**20)  # or skip
    assert elsewhere(fill_disks)
