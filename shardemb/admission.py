"""When a key earns its row: after it was seen some times, as a count-min sketch counts.

The sketch (Cormode, Muthukrishnan 2005) has `depth` rows of `width` counters. A key has one counter in each row, chosen
by its hash; a sighting raises the smallest of them (conservative update: Estan, Varghese 2002), and the smallest is the
count. It is never too low, and too high by more than ``e / width`` of all sightings with a probability of at most
``exp(-depth)``.
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
    """A key gets a row when it was seen `after` times.

    Parameters
    ----------
    after : int
        Sightings, the one that earns the row included; 1 gives every key a row at once.
    width : int
        Counters of a row of the sketch, of 4 bytes; rounded up to a multiple of 16.
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
        """Share of all sightings by which a count may be too high."""
        return math.e / self.width

    @property
    def failure(self) -> float:
        """Probability that it is too high by more than that."""
        return math.exp(-self.depth)

    def counters(self, hashes: NDArray[np.uint64], secret: tuple[np.uint64, np.uint64]) -> NDArray[np.int64]:
        """Choose a counter of each row of the sketch for keys, shape (n, depth): those of row k follow those before.

        ``h1 + k * h2`` modulo `width` (Kirsch, Mitzenmacher 2006), of two halves of the hash mixed with a secret.
        """
        mixed = (hashes ^ secret[1]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        first, second = mixed & np.uint64(0xFFFFFFFF), (mixed >> np.uint64(32)) | np.uint64(1)
        number = np.arange(self.depth, dtype=np.uint64)
        columns = (first[:, None] + number * second[:, None]) % np.uint64(self.width)
        places: NDArray[np.int64] = (columns + number * np.uint64(self.width)).astype(np.int64)
        return places


ADMISSIONS: dict[str, type[Admission]] = {"Admission": Admission}
