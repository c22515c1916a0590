"""What a checkpoint of another framework says about rows of a store, which it does not have: where they are, and when.

A reference is a dict of strings, numbers, booleans and None, so any format keeps it.
"""

from __future__ import annotations

import contextlib
import warnings
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from shardemb.errors import ShardEmbError

if TYPE_CHECKING:
    from collections.abc import Iterator

KIND = "rows of a table of shardemb"
"""What a reference says that it is."""

NAMES_IT = "the one that names this file"
"""What stands for the commit in a file that is written before its commit, which names it."""

_is_paired = ContextVar("is_paired", default=False)


@contextlib.contextmanager
def paired_with_a_commit() -> Iterator[None]:
    """Make references, and check them, for a file that is written before a commit, which names it."""
    token = _is_paired.set(True)
    try:
        yield
    finally:
        _is_paired.reset(token)


def reference(table: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return what tells the rows of a table as they are in the last commit of its store.

    If there are changes besides, the reference says so, with a `RuntimeWarning`: such rows cannot be found again.
    """
    store = table.store
    commit, paired = store.last_commit, _is_paired.get()
    changed = not paired and bool(store.has_changes)
    if changed:
        msg = (
            f"the state of table {table.name!r} refers to the last commit of {store.path}, which has changes since, so "
            f"it cannot be loaded: call store.commit() first, or use shardemb.torch.save"
        )
        warnings.warn(msg, RuntimeWarning, stacklevel=3)
    return {
        "kind": KIND,
        "path": str(store.path),
        "store": store.uuid,
        "table": table.name,
        "commit": NAMES_IT if paired else None if commit is None else commit.id,
        "step": None if paired or commit is None else commit.step,
        "updates": table.step,
        "changed_since": changed,
    }


def require(given: Any, table: Any) -> None:  # noqa: ANN401
    """Refuse a reference to other rows than a table has now.

    Raises
    ------
    TypeError
        It is no reference.
    ShardEmbError
        It is to another store, table or commit, or to changes that no commit has; or the table has such changes.
    """
    if not isinstance(given, dict) or given.get("kind") != KIND:
        msg = f"table {table.name!r}: expected a reference to its rows, which state_dict() has, got {given!r:.80}"
        raise TypeError(msg)
    problem = _problem_of_pair(given, table) if _is_paired.get() else _problem(given, table)
    if problem is not None:
        msg = f"the state of table {table.name!r} {problem}; nothing was loaded into its module"
        raise ShardEmbError(msg)


def _problem_of_pair(given: dict[str, Any], table: Any) -> str | None:  # noqa: ANN401
    if given["table"] != table.name:
        return _of_another_table(given)
    if given["commit"] != NAMES_IT or given["updates"] != table.step:
        return (
            f"was taken after {given['updates']} updates, and the table has had {table.step}: it is no part of what "
            f"the last commit was saved with"
        )
    return None


def _problem(given: dict[str, Any], table: Any) -> str | None:  # noqa: ANN401
    store = table.store
    if given["store"] != store.uuid:
        return (
            f"is of the store that was at {given['path']}, and this one is another, at {store.path}: open that one; if "
            f"this is a copy of it, load the state without the keys that end in '_extra_state', with strict=False"
        )
    if given["table"] != table.name:
        return _of_another_table(given)
    if given["commit"] == NAMES_IT:
        return "is in a file of shardemb.torch.save: load it with shardemb.torch.load"
    if given["changed_since"]:
        return (
            "was taken while the store had changes that were not committed, so its rows are not known: call "
            "store.commit() before state_dict(), or use shardemb.torch.save"
        )
    return _problem_of_commit(given, store)


def _problem_of_commit(given: dict[str, Any], store: Any) -> str | None:  # noqa: ANN401
    commit = store.last_commit
    saved = f"is of commit {given['commit']} (step {given['step']})"
    if commit is None or given["commit"] != commit.id:
        now = "there is none" if commit is None else f"the last one is {commit.id} (step {commit.step})"
        return f"{saved}, and {now}; a store has only its last commit: load the state that was saved with that one"
    if store.has_changes:
        return f"{saved}, and the store has changed since: call store.rollback() to go back to it"
    return None


def _of_another_table(given: dict[str, Any]) -> str:
    return f"is of table {given['table']!r}: make the module with store[{given['table']!r}]"
