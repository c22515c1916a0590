"""What a store that is open for reading does where a writer may change it meanwhile."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

from shardemb.errors import ShardEmbError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shardemb.replay import Replay


class Beside(NamedTuple):
    """How to see what is newest.

    Attributes
    ----------
    newest : callable
        Reads the images that are newer than the shards.
    reopen : callable
        Opens the store once more: a `Store`.
    """

    newest: Callable[[], Replay]
    reopen: Callable[[], Any]

    @contextlib.contextmanager
    def steady(self, places: dict[str, Path]) -> Iterator[tuple[dict[str, Path], Callable[[], Replay]]]:
        """Tell where the tables lie now, if that can be told, and what the log says anew."""
        try:
            with contextlib.closing(self.reopen()) as newest:
                places = newest._places()
        except ShardEmbError:  # damaged, then, and not moved
            pass
        yield places, self.newest
