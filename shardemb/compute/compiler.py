"""How kernels are compiled: once, into a cache on disk, and around the formulas that they are given.

A kernel releases the GIL and does not raise. It returns nothing, a number or one array, but never a *tuple*: if a
signal is pending while numba builds one for Python, the process crashes.

A formula (an optimizer's step, an initializer's values) is plain Python in a module of its own. `specialised` compiles
a kernel around it: the kernel's code with the formula in place of a global name. So numba sees a direct call, which it
can inline and cache. (numba never finds a kernel in the cache that takes a function as an argument.)

numba looks compiled code up by the name of the function, and notices only changes of the file that the function is in.
Therefore the name contains a checksum of everything else that defines the machine code: the source of this folder, of
``base`` and of the kernel's own folder, because kernels inline functions and constants of other modules, and the source
of each formula. So an edited formula never runs as it was before the edit.
"""

from __future__ import annotations

import logging
import marshal
import os
import stat
import tempfile
import time
import types
import warnings
import zlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numba
from numba import njit
from numba.core import event
from numba.core.compiler_lock import global_compiler_lock

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")

SILENT_SECONDS = 1.0
"""How long kernels are compiled before anybody is told."""

_HERE = Path(__file__).parent
_log = logging.getLogger("shardemb")


def kernel(function: F) -> F:
    """Compile a function, and keep the machine code on disk for the next process."""
    function.__qualname__ += f"_{_folder_crc(Path(function.__code__.co_filename).parent):08x}"
    # "numpy": a division by zero gives infinity, as in NumPy. An exception could stop an update halfway.
    compiled = njit(nogil=True, error_model="numpy")(function)
    try:
        compiled.enable_caching()
    except RuntimeError:  # there is no folder where numba may keep it
        if _cache_elsewhere():
            compiled.enable_caching()
    return cast(F, compiled)


def inlined(function: F) -> F:
    """Inline a function into every kernel that calls it.

    A call to a compiled function counts references to its array arguments. That takes 5 to 10 ns, which is two thirds
    of the time of finding a row.
    """
    return cast(F, njit(inline="always", error_model="numpy")(function))


def formula(function: Callable[..., Any], **helpers: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a formula for use within a kernel.

    It is inlined whatever its size, because LLVM does not vectorise a loop that contains a call.

    Parameters
    ----------
    function : callable
        Plain Python.
    **helpers : callable
        The functions that it calls, as compiled by `formula`, by the global names that it uses for them.
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
        Distinguishes it from other kernels made of the same template.
    **helpers : callable
        Formulas as compiled by `formula`, by the global names that the template uses for them.
    """
    return kernel(with_globals(template, name, helpers))


def with_globals(
    function: Callable[..., Any], name: str, helpers: dict[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """Return a copy of a function with `helpers` in place of global names, under a unique name.

    The name becomes the symbol of the compiled code. If two functions of the same name were loaded from the cache into
    one process, the linker would use the first one for both.
    """
    # A helper's name contains the checksum of its own source, so this checksum covers everything that is called.
    source = b"".join([_source(function), *(each.__qualname__.encode() for each in helpers.values())])
    name = f"{name}_{zlib.crc32(source):08x}"
    copy = types.FunctionType(function.__code__, {**function.__globals__, **helpers}, name)
    copy.__qualname__ = name
    return copy


@cache
def _cache_elsewhere() -> bool:
    """Let numba keep compiled code in a temporary folder of this user; return False if there can be none.

    Nobody else may write there, because numba runs what it finds.
    """
    folder = Path(tempfile.gettempdir()) / f"shardemb-kernels-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        private = status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) & 0o077 == 0
        usable = stat.S_ISDIR(status.st_mode) and private and os.access(folder, os.W_OK)
    except OSError:
        usable = False
    where = f"they are kept in {folder}" if usable else "each process compiles them again, for some seconds"
    warnings.warn(
        f"no folder for compiled kernels can be written, so {where}; "
        f"set NUMBA_CACHE_DIR to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )
    if usable:
        numba.config.CACHE_DIR = str(folder)
    return usable


class _Announcer(event.Listener):  # type: ignore[misc]  # numba has no types
    """Says once a process, when kernels have been compiled for a second, that this is what takes so long."""

    def __init__(self) -> None:
        self._seconds, self._started, self._depth, self._said = 0.0, 0.0, 0, False

    def on_start(self, compiling: event.Event) -> None:
        if _is_own(compiling):
            self._depth += 1
            if self._depth == 1:  # what a kernel calls is compiled within it
                self._started = time.monotonic()
            self._say_if_long(compiling)

    def on_end(self, compiling: event.Event) -> None:
        if _is_own(compiling):
            self._depth -= 1
            if self._depth == 0:
                self._seconds += time.monotonic() - self._started
            self._say_if_long(compiling)

    def silence(self) -> None:
        """Say nothing in this process."""
        self._said = True

    def _say_if_long(self, compiling: event.Event) -> None:
        folder = compiling.data["dispatcher"].stats.cache_path  # a formula has none: it is part of a kernel
        if self._said or folder is None or self._seconds < SILENT_SECONDS:
            return
        self._said = True
        # A warning, because that is what people see who have not configured anything.
        _log.warning(
            "compiling kernels, once: they are kept in %s; `shardemb warm-up` compiles all ahead", folder
        )


def _is_own(compiling: event.Event) -> bool:
    """Whether it is a kernel of this package: numba tells of all that the process compiles, other people's too."""
    function = getattr(compiling.data["dispatcher"], "py_func", None)
    return str(getattr(function, "__module__", "")).startswith("shardemb.")


announcer = _Announcer()
event.register("numba:compile", announcer)

# A child of a fork cannot end what another thread was compiling, and would wait for it. Registered before the hooks of
# stores, which take their locks before this one, as updates do.
os.register_at_fork(
    before=global_compiler_lock.acquire,
    after_in_parent=global_compiler_lock.release,
    after_in_child=global_compiler_lock.release,
)


def _source(function: Callable[..., Any]) -> bytes:
    """Return what defines a function: the text of its file, which has its constants too, or its code if it has none."""
    try:
        return Path(function.__code__.co_filename).read_bytes()
    except OSError:  # typed at a prompt, so there is no file
        return marshal.dumps(function.__code__)


@cache
def _folder_crc(folder: Path) -> int:
    """Checksum of the source of a folder of kernels, of this folder, and of ``base``, whose constants kernels use."""
    folders = (folder, _HERE, _HERE.parent / "base")
    files = sorted({file for each in folders for file in each.glob("*.py")})
    return zlib.crc32(b"".join(each.read_bytes() for each in files))
