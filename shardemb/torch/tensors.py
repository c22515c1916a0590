"""Between tensors and arrays."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OF_OTHER_PACKAGES = 256
"""From this number on, dtypes are not NumPy's own."""

_INTEGERS: dict[int, type[np.generic]] = {1: np.uint8, 2: np.int16}
"""By their bytes, the integers that torch and NumPy both know."""


def array_of_ids(ids: Any, *, own: bool = False) -> NDArray[Any]:  # noqa: ANN401
    """Return ids or keys as an array.

    Parameters
    ----------
    ids : torch.Tensor of int, or array_like of int, str or bytes
        Of any shape, on any device. Strings may be in nested lists.
    own : bool
        Whether they are kept for longer than the call, in which the caller may overwrite them: then they are copied.
        Otherwise they may share the memory of the tensor.

    Raises
    ------
    TypeError
        A tensor does not hold integers.
    """
    if isinstance(ids, torch.Tensor):
        if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype is torch.bool:
            msg = f"ids must be a tensor of integers, got {ids.dtype}: use ids.long()"
            raise TypeError(msg)
        array = ids.detach().cpu().numpy()
    else:
        array = _array_of_keys(ids)
    if own:
        narrow = array.dtype.kind in "iu" and array.dtype != np.uint64  # int64 need not be converted again
        return np.array(array, np.int64 if narrow else None)
    return array


def _array_of_keys(keys: Any) -> NDArray[Any]:  # noqa: ANN401
    if isinstance(keys, np.ndarray):
        return keys
    array = np.array(keys, dtype=object)  # NumPy's own strings and bytes are cut or padded
    if not array.size:
        return array.astype(np.int64)
    return array if isinstance(array.flat[0], str | bytes) else np.asarray(keys)


def tensor_of(rows: NDArray[Any], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return rows as a tensor; it shares their memory if that is on the device and they are of the dtype."""
    if rows.dtype.kind == "f" and rows.dtype.num < _OF_OTHER_PACKAGES:
        tensor = torch.from_numpy(rows)
    else:
        tensor = torch.from_numpy(rows.view(_INTEGERS[rows.dtype.itemsize]))
        tensor = tensor.view(getattr(torch, rows.dtype.name))
    return to_gpu(tensor, device, dtype) if device.type == "cuda" else tensor.to(device, dtype)


def gradient_of(leaf: torch.Tensor) -> NDArray[np.float32]:
    """Return the gradient that backward has left at a leaf, as float32 in the memory of this process."""
    if leaf.grad is None:
        return np.zeros(leaf.shape, np.float32)
    gradient = leaf.grad.detach()
    if gradient.is_cuda:
        gradient = from_gpu(gradient)
    array: NDArray[np.float32] = gradient.to("cpu", torch.float32).contiguous().numpy()
    return array


def to_gpu(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Copy to a GPU by a stream of its own, so that the copy does not wait for work that the GPU still has to do.

    The caller does not wait for the copy; what the GPU does with the result on the current stream does. torch keeps the
    pinned memory until the copy is done.
    """
    stream, current = _copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        copied = tensor.pin_memory().to(device, non_blocking=True).to(dtype)
    current.wait_stream(stream)
    copied.record_stream(current)  # its memory is that of the other stream, which may not reuse it before
    return copied


def from_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """Copy from a GPU into pinned memory as float32, after the work on the current stream, and wait for the copy."""
    stream = _copies(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    pinned = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=True)
    with torch.cuda.stream(stream):
        pinned.copy_(tensor, non_blocking=True)
    stream.synchronize()
    return pinned


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for copies between a GPU and the main memory."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Alias(torch.autograd.Function):
    """A leaf's values as a tensor that may be changed in place, as the result of `torch.nn.Embedding` may be."""

    @staticmethod
    def forward(context: Any, leaf: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        """Return a tensor that shares the memory of the leaf."""
        return leaf.detach()

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        """Return the gradient as it is."""
        return gradients[0]
