"""Bags of keys, and bags of several tables: what keys without a row become, and in which order things are checked."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shardemb.bags import Bags
from shardemb.engine import bags, batch
from shardemb.engine.bags import Form
from shardemb.engine.planned import norm_of
from shardemb.engine.training import Scaling, is_checked
from shardemb.vocabulary import keyed_rows
from shardemb.vocabulary.key_rows import read_steadily
from shardemb.vocabulary.keyed_rows import by_kind, missing_in

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import ArrayLike, NDArray

    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.engine.bags import PlannedBags
    from shardemb.engine.planned import Change
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.table_state import TableState
    from shardemb.vocabulary.keyed_rows import KeyedRows, Missing, MissingChange
    from shardemb.vocabulary.keys import KeysLike

_IN_LOOKUPS, _IN_CHANGES = ("error", "initial", "zeros"), ("error", "skip")


class CheckedBags(NamedTuple):
    """Bags whose keys were checked but not looked up, and what is said about them besides."""

    keyed: KeyedRows
    given: Bags
    form: Form
    missing: Missing | MissingChange

    @staticmethod
    def of(
        keyed: KeyedRows, given: Bags, missing: Missing | MissingChange, words: tuple[str, ...]
    ) -> CheckedBags:
        """Check bags of keys, without looking anything up."""
        bags.require_numbers(keyed.table)
        missing = keyed.checked_missing(missing, *words)
        checked = keyed.keys.checked(given.ids)
        form = Form.of(given, checked.shape, keyed.table.name)
        return CheckedBags(keyed, replace(given, ids=checked), form, missing)

    @property
    def num_bags(self) -> int:
        """The number of bags."""
        return self.form.bounds.size - 1

    def plan(self, find: Callable[[KeysLike], Int64Array]) -> PlannedBags:
        """Look up the rows of the keys with `find`."""
        keyed, given, missing = self.keyed, self.given, self.missing
        ids = find(given.ids)
        padding = None if given.padding_idx is None else int(keyed.known([given.padding_idx])[0])
        unknown, stand_ins = ids < 0, None
        if unknown.any():
            if missing == "error":
                keyed.refuse(given.ids, ids)
            if isinstance(missing, str):
                stand_ins = self._stand_ins(unknown)
            else:
                ids[unknown] = missing
        rows = replace(given, ids=np.maximum(ids, 0), padding_idx=padding)
        return bags.plan_read(rows, keyed.table, stand_ins, self.form)

    def _stand_ins(self, unknown: NDArray[np.bool_]) -> bags.StandIns:
        which = np.where(unknown, bags.DEFAULT, bags.ITSELF).reshape(-1)
        if self.missing == "initial":
            some = np.flatnonzero(unknown)
            which[some] = self.keyed.keys.future_rows(self.given.ids, some)
        # Keys that a change skips count as zeros too, as they did in the lookup that the gradients are of.
        return bags.StandIns(which, np.zeros(self.keyed.table.spec.embedding_dim, np.float32))


class CheckedChange(NamedTuple):
    """Checked bags of keys, and the gradients of what they are pooled to."""

    checked: CheckedBags
    gradients: Float32Array

    @staticmethod
    def of(
        keyed: KeyedRows, given: Bags, gradients: ArrayLike, missing: MissingChange, *, check_finite: bool
    ) -> CheckedChange:
        """Check both, without looking anything up."""
        checked = CheckedBags.of(keyed, given, missing, _IN_CHANGES)
        values = bags.checked_gradients(
            keyed.table, gradients, checked.num_bags, checked.form.weights, check_finite=check_finite
        )
        return CheckedChange(checked, values)

    def plan(self, *, create: bool, scale_grad_by_freq: bool) -> Change:
        """Plan the update, and give new keys rows; see `KeyedRows.plan_change`."""
        find = self.checked.keyed.finder(create=create)

        def plan() -> Change:
            return self.checked.plan(find).change(self.gradients, scale_grad_by_freq=scale_grad_by_freq)

        return self.checked.keyed.renewing(plan)


def read(
    keyed: KeyedRows, given: Bags, *, missing: Missing, create: bool, out: NDArray[np.float32] | None
) -> Float32Array:
    """Look up bags of keys; see `KeyedTable.lookup_bag`."""
    checked = CheckedBags.of(keyed, given, missing, _IN_LOOKUPS)
    keyed.require_output(out, "float32", (checked.num_bags,))
    find = keyed.finder(create=create)
    return read_steadily([keyed.keys], lambda: checked.plan(find).read(out))


def weight_gradient(keyed: KeyedRows, given: Bags, gradients: ArrayLike, *, missing: Missing) -> Float32Array:
    """Return the gradient of the weights of bags; see `KeyedTable.bag_weight_gradient`."""
    checked = CheckedBags.of(keyed, given, missing, _IN_LOOKUPS)
    return read_steadily([keyed.keys], lambda: checked.plan(keyed.keys.lookup).weight_gradient(gradients))


def read_many(
    runtime: Runtime,
    targets: Mapping[str, TableState | KeyedRows],
    given: Mapping[str, Any],
    *,
    missing: Missing,
    create: bool,
) -> dict[str, Float32Array]:
    """Look up bags in several tables together; see `Store.lookup_bag`."""
    tables, keyed = by_kind(targets)
    # All of them are checked before the first key is added.
    plain = {name: bags.plan_read(bags.as_bags(given[name]), table) for name, table in tables.items()}
    checked = {
        name: CheckedBags.of(each, bags.as_bags(given[name]), missing, _IN_LOOKUPS)
        for name, each in keyed.items()
    }
    find = {name: each.finder(create=create) for name, each in keyed.items()}

    def read() -> dict[str, Float32Array]:
        wanted = plain | {name: each.plan(find[name]) for name, each in checked.items()}
        return bags.read_many(runtime, {name: wanted[name] for name in targets})

    return read_steadily([each.keys for each in keyed.values()], read)


def change_many(
    runtime: Runtime,
    targets: Mapping[str, TableState | KeyedRows],
    batches: Mapping[str, tuple[Any, ...]],
    *,
    missing: MissingChange,
    create: bool,
    scale_grad_by_freq: bool,
    scaling: Scaling | None,
    check_finite: bool,
) -> float | None:
    """Take one optimizer step in several tables, all or none, by the gradients of bags; see `Store.update_bag`."""
    runtime.check_open()
    given = {name: bags.with_gradients(each, name) for name, each in batches.items()}
    return update_many(
        runtime,
        targets,
        given,
        missing=missing,
        create=create,
        scale_grad_by_freq=scale_grad_by_freq,
        scaling=scaling,
        check_finite=check_finite,
    )


def update_many(
    runtime: Runtime,
    targets: Mapping[str, TableState | KeyedRows],
    batches: Mapping[str, tuple[Any, ArrayLike]],
    *,
    missing: MissingChange | Mapping[str, MissingChange],
    create: bool,
    scaling: Scaling | None,
    check_finite: bool,
    scale_grad_by_freq: bool = False,
) -> float | None:
    """Take one optimizer step in several tables, all or none, by gradients of rows or bags; see `Store.update`.

    With `scale_grad_by_freq`, all of them are of bags.
    """
    runtime.check_open()
    changes = _plan_updates(
        targets,
        batches,
        missing,
        create=create,
        check_finite=is_checked(scaling, check_finite=check_finite),
        scale_grad_by_freq=scale_grad_by_freq,
    )
    return batch.change(runtime, changes, scaling)


def gradient_norm(
    runtime: Runtime,
    targets: Mapping[str, TableState | KeyedRows],
    batches: Mapping[str, tuple[Any, ArrayLike]],
    *,
    missing: MissingChange | Mapping[str, MissingChange],
) -> float:
    """Return the norm of all gradients together, and change nothing; see `Store.gradient_norm`."""
    runtime.check_open()
    changes = _plan_updates(targets, batches, missing, create=False, check_finite=False)
    return norm_of(changes, Scaling(scale=1.0), partial(batch.run_pieces, runtime))


def _plan_updates(
    targets: Mapping[str, TableState | KeyedRows],
    batches: Mapping[str, tuple[Any, ArrayLike]],
    missing: MissingChange | Mapping[str, MissingChange],
    *,
    create: bool,
    check_finite: bool,
    scale_grad_by_freq: bool = False,
) -> list[Change]:
    """Check updates by gradients of rows or bags, and give new keys rows."""
    pooled = {name for name, each in batches.items() if _has_bags(each)}
    of_bags = {name: each for name, each in targets.items() if name in pooled}
    of_rows = {name: each for name, each in targets.items() if name not in pooled}
    # All of them are checked before the first key is added.
    changes, waiting = keyed_rows.check_changes(
        of_rows, batches, missing=missing, create=create, check_finite=check_finite
    )
    more, checked = _check_changes(
        of_bags, batches, missing, check_finite=check_finite, scale_grad_by_freq=scale_grad_by_freq
    )
    changes += more
    changes += [plan() for plan in waiting]
    return changes + [each.plan(create=create, scale_grad_by_freq=scale_grad_by_freq) for each in checked]


def _has_bags(given: tuple[Any, ArrayLike]) -> bool:
    return isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[0], Bags)


def _check_changes(
    targets: Mapping[str, TableState | KeyedRows],
    given: Mapping[str, tuple[Bags, ArrayLike]],
    missing: MissingChange | Mapping[str, MissingChange],
    *,
    scale_grad_by_freq: bool,
    check_finite: bool,
) -> tuple[list[Change], list[CheckedChange]]:
    """Check updates by the gradients of bags: plan those by row id, and add no key."""
    tables, keyed = by_kind(targets)
    changes = [
        bags.plan_change(
            table, *given[name], scale_grad_by_freq=scale_grad_by_freq, check_finite=check_finite
        )
        for name, table in tables.items()
    ]
    checked = [
        CheckedChange.of(each, *given[name], missing_in(missing, name), check_finite=check_finite)
        for name, each in keyed.items()
    ]
    return changes, checked
