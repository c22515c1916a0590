"""The base class of all optimizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from shardemb.base import validation

if TYPE_CHECKING:
    from shardemb.base.validation import Float32Array


@dataclass(frozen=True)
class Optimizer(ABC):
    """Base class of all optimizers; use one of its subclasses."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.type == "float":  # scalars of NumPy become floats, which JSON can hold
                value = validation.number(getattr(self, each.name), each.name, minimum=0.0)
                object.__setattr__(self, each.name, value)

    @abstractmethod
    def state_columns(self, embedding_dim: int) -> dict[str, int]:
        """Return name and width (values per row) of each state column, in the order of the record."""

    @abstractmethod
    def scalars(self, step: int) -> tuple[float, ...]:
        """Return the numbers that `row_step` reads, for update number `step` (1 for the first)."""

    @staticmethod
    @abstractmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place.

        `weight` and `gradient` have shape (dim,). `state` holds all state columns of the row, one after the other.
        """

    def initial_state(self) -> dict[str, float]:
        """Return the initial value of each state column; columns that are not named start from zero."""
        return {}
