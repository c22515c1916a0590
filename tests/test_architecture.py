"""The rules of the house, checked on the source: who may import whom, who may touch the disk, how long things are."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import shardemb
from shardemb.initializers import Uniform

SOURCE = Path(shardemb.__file__).parent

# From the ground up: a room imports only from rooms that stand before it.
ROOMS = [
    "errors",
    "arrays",
    "persisted",
    "optim",
    "initializers",
    "admission",
    "spec",
    "manifest",
    "report",
    "intrinsics",
    "kernels",
    "grouping",
    "bitmaps",
    "hashing",
    "probing",
    "records",
    "matching",
    "keys",
    "plan",
    "files",
    "replay",
    "slots",
    "scratch",
    "overlay",
    "results",
    "progress",
    "layout",
    "scheduler",
    "runtime",
    "log",
    "checks",
    "fold",
    "folders",
    "shards",
    "usage",
    "rebuild",
    "batch",
    "keyparts",
    "keyindex",
    "journal",
    "verify",
    "export",
    "table",
    "tables",
    "keystore",
    "vocabulary",
    "keyed",
    "vocabularies",
    "forks",
    "beside",
    "store",
    "opening",
    "text",
    "corpus",
    "quickstart",
    "cli",
]

# These stand on the public names alone, like a user's program.
APPLICATIONS = {"quickstart", "cli"}

# A library of the outside world, and the rooms that may import it.
OUTSIDE = {
    "zarr": {"layout"},
    "dask": {"scheduler"},
    "numba": {"intrinsics", "kernels"},
    "llvmlite": {"intrinsics"},
    "pyarrow": {"export", "keys", "vocabulary"},
    "xxhash": {"replay"},
    "click": {"cli"},
    "matplotlib": {"cli"},
    "rich": {"progress", "quickstart", "cli"},
    "ctypes": {"files", "scheduler"},
    "mmap": {"files"},
    "fcntl": {"files"},
    "shutil": {"files"},
    "tempfile": set(),
    "subprocess": set(),
    "socket": set(),
}

MODULES = {path.stem: path.read_text() for path in sorted(SOURCE.glob("*.py"))}
TREES = {name: ast.parse(text) for name, text in MODULES.items()}

every_module = pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])


def typing_only(tree):
    """The nodes below ``if TYPE_CHECKING``."""
    return {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }


def imports(tree):
    """Every import, also within functions and for types alone: the dotted names of modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "shardemb":
                yield from (f"shardemb.{alias.name}" for alias in node.names)
            else:
                yield node.module


# ---- who imports whom -------------------------------------------------------------------------------------------


def test_every_module_has_its_place():
    assert set(MODULES) - {"__init__"} == set(ROOMS)


@every_module
def test_imports_go_strictly_downward(name):
    below = ROOMS[: ROOMS.index(name)]
    inside = {module.split(".")[1] for module in imports(TREES[name]) if module.startswith("shardemb.")}
    assert inside <= set(below)


@every_module
def test_only_applications_use_the_package_as_its_users_do(name):
    assert ("shardemb" in set(imports(TREES[name]))) <= (name in APPLICATIONS)


@pytest.mark.parametrize("library", OUTSIDE)
def test_each_outside_library_has_its_room(library):
    """For types alone, anyone may name it: nothing is loaded then."""
    users = set()
    for name, tree in TREES.items():
        skipped = typing_only(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and node not in skipped:
                users |= {name for module in imports(node) if module.split(".")[0] == library}
    assert users <= OUTSIDE[library]


def test_the_ground_floor_needs_nothing_but_numpy_and_the_standard_library():
    for name in ROOMS[: ROOMS.index("intrinsics")]:
        tops = {module.split(".")[0] for module in imports(TREES[name])}
        assert tops - set(sys.stdlib_module_names) <= {"numpy", "shardemb"}


HEAVY = ["zarr", "numba", "llvmlite", "pyarrow", "dask", "rich", "click"]
HEAVY += ["shardemb.files", "shardemb.store", "shardemb.text"]


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, shardemb; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_come_when_they_are_asked_for():
    code = "import sys, shardemb; shardemb.open; print('numba' in sys.modules, shardemb.Store.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "Store"]


def test_reading_a_store_does_not_load_zarr(tmp_path):
    """The import takes 0.2 s, of about one until a process has its first rows."""
    with shardemb.open(tmp_path / "s.zarr") as store:
        store.create_table("t", num_embeddings=10, embedding_dim=4, initializer=Uniform(0, 1))
        store.commit()
    code = (
        "import sys, shardemb; sys.modules['zarr'] = None; store = shardemb.open(sys.argv[1], mode='r'); "
        "print(store['t'].lookup([1, 2]).shape)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "s.zarr")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "(2, 4)\n"


# ---- who touches the disk ---------------------------------------------------------------------------------------

# Of the module os, outside files.py: nothing that opens, changes or syncs a file.
OS_ALLOWED = {"getpid", "sysconf", "fspath", "register_at_fork"}

# Calls by which a path or an open file reads or changes what is on disk. (`replace` is also a method of str.)
TOUCHES = {
    "open", "read_text", "read_bytes", "write_text", "write_bytes", "unlink", "rename", "mkdir", "rmdir", "touch",
    "symlink_to", "hardlink_to", "chmod", "lchmod", "link_to", "truncate", "rmtree", "copyfile", "move", "fsync",
    "walk", "scandir", "remove", "removedirs", "makedirs", "memmap", "tofile", "fromfile", "save", "savez", "load",
}  # fmt: skip

# Who calls such a thing all the same: module and call, with the reason.
EXCEPTIONS = {
    ("kernels", "read_bytes"): "its own source, whose checksum is part of the name of a compiled kernel",
    ("intrinsics", "load"): "from memory",
    ("opening", "read_text"): "the memory limit of the machine, below /sys",
    ("text", "open"): "text files of the caller's, to read; no part of a store",
    ("results", "remove"): "of a list",
    ("scheduler", "os.sched_getaffinity"): "the cores that a thread may use",
    ("scheduler", "os.sched_setaffinity"): "the same",
    ("corpus", "os.walk"): "the standard library's source, which is the corpus",
    ("corpus", "tokenize.open"): "the same",
    ("quickstart", "mkdir"): "an application's own folder; no part of a store",
}


def touches(tree):
    """Calls that touch the disk: ``open``, ``os.something``, and methods from `TOUCHES`, but not those of files.py."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id == "open":
            yield "open"
        if not isinstance(called, ast.Attribute):
            continue
        owner = ast.unparse(called.value)
        if owner == "os" and called.attr not in OS_ALLOWED:
            yield f"os.{called.attr}"
        elif owner == "tokenize":
            yield f"tokenize.{called.attr}"
        elif called.attr in TOUCHES and owner not in ("files", "shardemb", "os"):
            yield called.attr


@every_module
def test_only_files_py_touches_the_disk(name):
    """So a simulator that replaces its functions sees all that happens."""
    if name != "files":
        assert {(name, call) for call in touches(TREES[name])} <= set(EXCEPTIONS)


def test_every_exception_is_still_needed():
    assert {(name, call) for name, tree in TREES.items() for call in touches(tree)} >= set(EXCEPTIONS)


@pytest.mark.parametrize(
    "code",
    [
        "open('x')",
        "os.open('x', 0)",
        "os.rename(a, b)",
        "path.write_text('')",
        "Path('x').open()",
        "np.load(x)",
    ],
)
def test_the_check_itself_sees_what_touches_the_disk(code):
    assert list(touches(ast.parse(code)))


def test_callers_use_files_by_its_name():
    """``files.write(...)`` can be replaced by a simulator, ``from files import write`` cannot."""
    for tree in TREES.values():
        assert not any(
            isinstance(node, ast.ImportFrom) and node.module == "shardemb.files" for node in ast.walk(tree)
        )


# ---- house numbers ----------------------------------------------------------------------------------------------

MAX_LINES, MAX_BODY, MAX_PARAMETERS = 400, 40, 8

FUNCTIONS = [
    (module, node)
    for module, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]


def docstring(node):
    first = node.body[0] if node.body else None
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        return first
    return None


def docstring_lines(tree):
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (found := docstring(node)):
            lines |= set(range(found.lineno, found.end_lineno + 1))
    return lines


def code_lines(module, first, last):
    """Lines from first to last that are neither blank nor part of a docstring."""
    text, hidden = MODULES[module].splitlines(), docstring_lines(TREES[module])
    return sum(1 for number in range(first, last + 1) if number not in hidden and text[number - 1].strip())


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_short(name):
    assert code_lines(name, 1, len(MODULES[name].splitlines())) <= MAX_LINES


def test_bodies_are_short():
    long = {}
    for module, node in FUNCTIONS:
        body = node.body[1:] if docstring(node) else node.body
        if body and (lines := code_lines(module, body[0].lineno, node.end_lineno)) > MAX_BODY:
            long[f"{module}.{node.name}"] = lines
    assert long == {}


def parameters(node):
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    every += [each for each in (node.args.vararg, node.args.kwarg) if each]
    return [each for each in every if each.arg not in ("self", "cls")]


HOT_LOOPS = {"kernels", "probing"}


def test_parameters_are_few():
    """But for kernels: they take arrays and numbers one by one, because numba compiles no objects of ours."""
    many = {
        f"{module}.{node.name}": len(parameters(node))
        for module, node in FUNCTIONS
        if module not in HOT_LOOPS and len(parameters(node)) > MAX_PARAMETERS
    }
    many.pop("store.create_table")  # all that is fixed about a table is said there once, by name
    assert many == {}


def test_everything_is_annotated():
    bare = [
        f"{module}.{node.name}"
        for module, node in FUNCTIONS
        if node.returns is None or any(each.annotation is None for each in parameters(node))
    ]
    assert bare == []


def comments(name):
    readline = io.StringIO(MODULES[name]).readline
    return [token.string for token in tokenize.generate_tokens(readline) if token.type == tokenize.COMMENT]


@pytest.mark.parametrize("name", MODULES)
def test_what_is_silenced_is_named(name):
    for comment in comments(name):
        if "type:" in comment and "ignore" in comment:
            assert re.search(r"type: ignore\[[a-z-]+(, ?[a-z-]+)*\]", comment), comment
        if "noqa" in comment:
            assert re.search(r"noqa: [A-Z]+[0-9]+", comment), comment


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_left_for_later(name):
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", MODULES[name])


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_for(name):
    text = ast.get_docstring(TREES[name])
    assert text
    assert text.splitlines()[0].endswith((".", "?"))


@pytest.mark.parametrize("name", MODULES)
def test_no_mutable_defaults_and_no_bare_except(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
        if isinstance(node, ast.FunctionDef):
            defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            assert not any(isinstance(default, ast.List | ast.Dict | ast.Set) for default in defaults)
