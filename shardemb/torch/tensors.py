"""Between tensors and arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def array_of_ids(ids: torch.Tensor) -> NDArray[Any]:
    """Return the ids of a tensor as an array, without a copy where they are in the memory of this process.

    Raises
    ------
    TypeError
        They are not integers.
    """
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype is torch.bool:
        msg = f"ids must be a tensor of integers, got {ids.dtype}: use ids.long()"
        raise TypeError(msg)
    array: NDArray[Any] = ids.detach().cpu().numpy()
    return array


def leaf_of(rows: NDArray[np.float32], device: torch.device) -> torch.Tensor:
    """Return rows as a tensor whose gradient backward collects; it shares their memory on the CPU."""
    return torch.from_numpy(rows).to(device).requires_grad_()
