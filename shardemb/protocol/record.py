"""What the head of a distributed store says in its commits: where partitions are, and what is decided."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from shardemb.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardemb.format.manifest import Commit
    from shardemb.protocol.messages import Decided

Places: TypeAlias = tuple[tuple[str, str], ...]
"""For each partition the owner, which is the name, address or host of a worker, and the folder there."""

KEY = "shardemb.distributed"
"""Where the metadata of the head's commit has what this module knows."""


def partition_name(part: int) -> str:
    """Return the name of a partition's folder, within that of its owner."""
    return f"{part:05}.zarr"


@dataclass(frozen=True)
class Record:
    """What the head's commit says.

    Attributes
    ----------
    places : Places
    decided : Decided
        The last commit of all partitions.
    openings : int
        How often the head was opened to write.
    complete : bool
        Whether all partitions have been created. From then on, one that is missing is an error.
    tables : dict of str to dict
        For each table of the last commit ``num_embeddings``, ``padding_idx`` and ``counters``.
    step : int
    metadata : dict
        As given to `DistributedStore.commit`.
    """

    places: Places
    decided: Decided = (0, None)
    openings: int = 0
    complete: bool = False
    tables: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as metadata of a commit."""
        return {KEY: asdict(self)}

    @staticmethod
    def of(commit: Commit | None, path: object) -> Record:
        """Read that of the last commit of the head at a path.

        Raises
        ------
        FormatError
            The store is none that is distributed.
        """
        found = None if commit is None else commit.metadata.get(KEY)
        if found is None:
            msg = f"{path} is a store of one machine: open it with shardemb.open"
            raise FormatError(msg)
        rest = dict(found)
        places = tuple((name, folder) for name, folder in rest.pop("places"))
        return Record(places, decided_of(rest.pop("decided")), **rest)


def decided_of(found: Any) -> Decided:  # noqa: ANN401
    """Return a decided attempt, as it was before it became JSON."""
    commit, attempt = found
    return commit, None if attempt is None else tuple(attempt)
