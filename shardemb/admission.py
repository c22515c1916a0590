"""When a key gets its row: after it has occurred a number of times, as counted by a count-min sketch.

The sketch (Cormode, Muthukrishnan 2005) has `depth` rows of `width` counters. A key has one counter in each row, chosen
by its hash. An occurrence increments the smallest of them (conservative update: Estan, Varghese 2002), and the smallest
is the key's count. It is never too low. With a probability of at most ``exp(-depth)`` it is too high by more than
``e / width`` times the number of all occurrences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base import validation

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Admission:
    """A key gets a row when it occurs for the `after`-th time.

    Parameters
    ----------
    after : int
        Occurrences, including the one that earns the row; with 1, every key gets a row immediately.
    width : int
        Counters in a row of the sketch, 4 bytes each; rounded up to a multiple of 16.
    depth : int
        Rows of the sketch.

    Examples
    --------
    >>> import shardemb
    >>> sketch = shardemb.Admission(after=3, width=2**20, depth=4)
    >>> sketch.nbytes, round(sketch.error * 1e6, 2), round(sketch.failure, 3)
    (16777216, 2.59, 0.018)
    """

    after: int
    width: int = 2**20
    depth: int = 4

    def __post_init__(self) -> None:
        limits = {"after": 2**31, "width": 2**36, "depth": 16}
        for name, maximum in limits.items():
            value = validation.count(getattr(self, name), name, maximum=maximum)
            object.__setattr__(self, name, -(-value // 16) * 16 if name == "width" else value)

    @property
    def nbytes(self) -> int:
        """Bytes of all counters."""
        return 4 * self.width * self.depth

    @property
    def error(self) -> float:
        """By how much a count may be too high, as a fraction of the number of all occurrences."""
        return math.e / self.width

    @property
    def failure(self) -> float:
        """Probability that a count is too high by more than that."""
        return math.exp(-self.depth)

    def counters(self, hashes: NDArray[np.uint64], secret: tuple[np.uint64, np.uint64]) -> NDArray[np.int64]:
        """Choose each key's counter in every row of the sketch: indices, shape (n, depth), row k from ``k * width`` on.

        ``h1 + k * h2`` modulo `width` (Kirsch, Mitzenmacher 2006), where h1 and h2 are the halves of the hash after it
        was mixed with a secret.
        """
        mixed = (hashes ^ secret[1]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        first, second = mixed & np.uint64(0xFFFFFFFF), (mixed >> np.uint64(32)) | np.uint64(1)
        number = np.arange(self.depth, dtype=np.uint64)
        columns = (first[:, None] + number * second[:, None]) % np.uint64(self.width)
        indices: NDArray[np.int64] = (columns + number * np.uint64(self.width)).astype(np.int64)
        return indices


ADMISSIONS: dict[str, type[Admission]] = {"Admission": Admission}
