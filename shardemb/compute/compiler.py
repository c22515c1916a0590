"""How kernels are compiled: once, into a cache on disk, and around the formulas that they are given.

A kernel releases the GIL and raises nothing. It returns nothing, a number or one array: where a signal is pending while
numba makes a *tuple* for Python, the process crashes.

A formula (an optimizer's step, an initializer's values) is plain Python in a module of its own. `specialised` compiles
a kernel around it: the same code with other global names, so that numba sees a direct call, which it can inline and
cache. (A kernel that takes a function as an argument is never found in the cache again.)

numba finds compiled code by the name of the function and notices a change of the one file in which it stands. What else
defines the machine code goes into the name: the source of this folder and of the kernel's own, because kernels inline
functions of other modules; and the source of each formula. So an edited formula is never run as it was before.
"""

from __future__ import annotations

import marshal
import types
import zlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from numba import njit

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")

_HERE = Path(__file__).parent


def kernel(function: F) -> F:
    """Compile a function, with its machine code kept on disk for the next process."""
    function.__qualname__ += f"_{_folder_crc(Path(function.__code__.co_filename).parent):08x}"
    # "numpy": a division by zero gives infinity, as in NumPy; raising could stop an update half way.
    return cast(F, njit(nogil=True, cache=True, error_model="numpy")(function))


def inlined(function: F) -> F:
    """Make a function part of each kernel that calls it.

    A call of a compiled function counts references to the arrays that it is given, which takes 5 to 10 ns: two thirds
    of the time that finding a row takes.
    """
    return cast(F, njit(inline="always", error_model="numpy")(function))


def formula(function: Callable[..., Any], **helpers: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a formula for use within a kernel.

    It is inlined whatever its size: LLVM does not vectorise a loop that calls something.

    Parameters
    ----------
    function : callable
        Plain Python.
    **helpers : callable
        What `formula` made of the functions that it calls, by the global names that it calls them by.
    """
    compile_ = njit(nogil=True, error_model="numpy", forceinline=True)
    made = compile_(with_globals(function, function.__qualname__.replace(".", "_"), helpers))
    return cast("Callable[..., Any]", made)


def specialised(
    template: Callable[..., Any], name: str, **helpers: Callable[..., Any]
) -> Callable[..., None]:
    """Compile a kernel with formulas in place of some of the functions that it calls.

    Parameters
    ----------
    template : callable
        Plain Python, as for `kernel`.
    name : str
        Tells it from other kernels of the same template.
    **helpers : callable
        What `formula` made, by the global names that the template calls.
    """
    return kernel(with_globals(template, name, helpers))


def with_globals(
    function: Callable[..., Any], name: str, helpers: dict[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """Return a function's code with `helpers` in place of global names, under a name that no other code has.

    The name becomes the symbol of the compiled code. If two functions had the same name and were loaded from the cache
    into one process, the linker would take the first for both.
    """
    # The names of helpers carry the checksums of their own sources, so this one covers all that is called.
    source = b"".join([_source(function), *(each.__qualname__.encode() for each in helpers.values())])
    name = f"{name}_{zlib.crc32(source):08x}"
    copy = types.FunctionType(function.__code__, {**function.__globals__, **helpers}, name)
    copy.__qualname__ = name
    return copy


def _source(function: Callable[..., Any]) -> bytes:
    """Return what defines a function: its file, with the constants that it uses; its code where there is no file."""
    try:
        return Path(function.__code__.co_filename).read_bytes()
    except OSError:  # typed at a prompt
        return marshal.dumps(function.__code__)


@cache
def _folder_crc(folder: Path) -> int:
    """Checksum of the source of a folder of kernels, and of this one."""
    files = sorted({*folder.glob("*.py"), *_HERE.glob("*.py")})
    return zlib.crc32(b"".join(each.read_bytes() for each in files))
