"""The rules of the house, checked on the source: who may import whom, who may touch the disk, how long things are."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

import shardemb
from shardemb.initializers import Uniform

SOURCE = Path(shardemb.__file__).parent

# From the ground up: folders and single modules, and what is in each folder. A module imports only from those before it
# in its own folder, and from folders below; folders that share a level do not import each other.
ROOMS = {
    "errors": [],
    "base": [
        "arrays", "forks", "formatting", "interrupts", "paths", "progress", "serialization", "sizes", "validation",
        "sampling",
    ],
    "compute": [
        "compiler", "intrinsics", "scheduler", "file_blocks", "grouping", "row_index", "plan", "residency",
        "row_kernels", "pooling",
    ],
    "optim": [
        "schedules", "options", "base", "sgd", "adagrad", "adam", "lamb", "rmsprop", "ftrl", "__init__",
    ],
    "dtypes": [],
    "initializers": [],
    "admission": [],
    "bags": [],
    "format": [
        "documents", "fill_records", "log_records", "store_paths", "ranges", "spec", "manifest", "zarr_metadata",
        "table_files",
    ],
    "precision": ["codecs", "coded_rows", "records"],
    "storage": ["files", "address_space", "folders", "checksums", "table_folder"],
    "commits": [
        "log_limit", "fills", "log_reader", "undo", "fold", "log_writer", "rewrite", "tags", "copies", "verify",
    ],
    "memory": [
        "output_pool", "slots", "spill_file", "overlay", "frozen_rows", "memory_budget", "hidden_rows",
        "past_blocks", "totals",
    ],
    "engine": [
        "warming", "runtime", "training", "filled_rows", "shards", "planned", "filling", "batch", "bags",
        "table_state",
    ],
    "imports": [
        "blocks", "streams", "text", "binary", "arrays", "tensors", "gguf", "containers", "columnar", "formats",
    ],
    "exports": [
        "selection", "targets", "arrow", "remote", "parquet", "words", "arrays", "projector", "lance", "formats",
    ],
    "table_source": [],
    "references": [],
    "vocabulary": [
        "hashing", "index_kernels", "key_records", "index_files", "key_kernels", "hash_index", "keys",
        "key_tables", "key_rows", "keyed_rows",
    ],
    "keyed_bags": [],
    "search": [
        "kernels", "metrics", "candidates", "exact", "words", "correlation", "evaluation", "changed_rows", "graph",
        "index",
    ],
    "session": [
        "forking", "display", "pending_commit", "attempt", "base", "journal", "partition_journal",
        "table_catalog", "vocabulary_catalog", "session",
    ],
    "store": [
        "vocabulary", "table", "keyed_table", "importing", "tagging", "store", "writer", "opening",
        "partition", "spreading",
    ],
    "text": [],
    "dynamicemb": [],
    "protocol": ["messages", "era", "coordination", "record"],
    "splitting": [],
    "distributed": [
        "clusters", "transport", "routing", "work", "batches", "owner", "link", "head", "table", "store",
    ],
    "ranks": ["transport", "parts", "calls", "tables", "ranks"],
    "torch": [
        "tensors", "pending", "merging", "embedding", "embedding_bag", "collections", "optimizer", "lookahead",
        "checkpoint", "conversion",
    ],
    "quickstart": ["corpus", "training"],
    "warm_up": [],
    "cli": [],
}  # fmt: skip

LEVELS = [
    {"errors"}, {"base"}, {"compute", "optim", "initializers", "admission", "bags", "dtypes"}, {"format"},
    {"precision", "protocol"}, {"storage"}, {"commits", "memory"}, {"engine", "imports", "exports"},
    {"table_source", "references"}, {"vocabulary"},
    {"keyed_bags"}, {"search"}, {"session"}, {"store", "ranks"}, {"text", "torch", "dynamicemb", "splitting"},
    {"distributed"},
    {"quickstart", "warm_up"},
    {"cli"},
]  # fmt: skip

# These stand on the public names alone, like a user's program.
APPLICATIONS = {"quickstart.training", "warm_up", "cli"}

# A library of the outside world, and the modules that may import it.
OUTSIDE = {
    "zarr": {"format.zarr_metadata", "imports.containers"},
    "h5py": {"imports.containers"},
    "dask": {"compute.scheduler", "distributed.clusters"},
    "numba": {"compute.intrinsics", "compute.compiler", "compute.residency"},
    "llvmlite": {"compute.intrinsics"},
    "pyarrow": {
        "exports.arrow",
        "exports.parquet",
        "exports.remote",
        "exports.words",
        "exports.projector",
        "exports.lance",
        "vocabulary.keys",
        "vocabulary.key_rows",
        "imports.streams",
        "imports.text",
        "imports.binary",
        "imports.gguf",
        "imports.columnar",
    },
    "lance": {"exports.lance"},
    "fsspec": {"exports.remote"},
    "xxhash": {"format.documents"},
    "ml_dtypes": {"dtypes"},
    "click": {"cli"},
    "matplotlib": {"cli"},
    "rich": {"base.progress", "quickstart.training", "cli"},
    "usearch": {"search.graph"},
    "ctypes": {"storage.files", "storage.address_space", "compute.scheduler"},
    "mmap": {"storage.address_space"},
    "fcntl": {"storage.files"},
    "shutil": {"storage.files"},
    "tempfile": {"compute.compiler", "warm_up"},
    "torch": {
        "dynamicemb",
        "imports.tensors",
        "ranks.transport",
        "ranks.ranks",
        "torch",
        *(f"torch.{name}" for name in ROOMS["torch"]),
    },
    "distributed": {"distributed.clusters", "distributed.transport", "distributed.owner"},
    "subprocess": set(),
    "socket": set(),
}


def name_of(path):
    """The dotted name of a module below the package: ``storage.files``, and ``storage`` for its folder."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path.read_text() for path in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(text) for name, text in MODULES.items()}

ORDER = [
    f"{room}.{module}".removesuffix(".__init__")
    for room, modules in ROOMS.items()
    for module in ([*modules, *["__init__"] * ("__init__" not in modules)] if modules else ["__init__"])
]
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}

every_module = pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])


@cache
def nodes_of(tree):
    """List all nodes of a tree, which is walked once."""
    return list(ast.walk(tree))


@cache
def typing_only(tree):
    """The nodes below ``if TYPE_CHECKING``."""
    return {
        node
        for block in nodes_of(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in nodes_of(statement)
    }


def imports(tree):
    """Every import, also within functions and for types alone: the dotted names of modules."""
    for node in nodes_of(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module.split(".")[0] != "shardemb":
                yield node.module
                continue
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.removeprefix("shardemb.") in MODULES else node.module


def inside(name):
    """The modules of the package that a module imports."""
    return {each.removeprefix("shardemb.") for each in imports(TREES[name]) if each.startswith("shardemb.")}


# ---- who imports whom -------------------------------------------------------------------------------------------


def test_every_module_has_its_place():
    assert set(MODULES) - {"__init__"} == set(ORDER)
    assert set(LEVEL) == set(ROOMS)


def test_folders_are_small():
    assert max(map(len, ROOMS.values())) <= 10


@every_module
def test_imports_go_strictly_downward(name):
    room = name.split(".")[0]
    for other in inside(name):
        there = other.split(".")[0]
        if there == room:
            assert ORDER.index(other) < ORDER.index(name), other
        else:
            assert LEVEL[there] < LEVEL[room], other


def private_accesses(tree):
    """Names with an underscore that belong to another object or module."""
    for node in nodes_of(tree):
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr, re.I):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))


@every_module
def test_nobody_uses_what_is_private_to_another(name):
    assert sorted(private_accesses(TREES[name])) == []


@pytest.mark.parametrize("code", ["table._shards", "from shardemb.store import _x", "self.a._b", "f()._x"])
def test_the_check_itself_sees_what_is_private(code):
    assert list(private_accesses(ast.parse(code)))


@every_module
def test_only_applications_use_the_package_as_its_users_do(name):
    assert ("shardemb" in set(imports(TREES[name]))) <= (name in APPLICATIONS)


@pytest.mark.parametrize("library", OUTSIDE)
def test_each_outside_library_has_its_room(library):
    """For types alone, anyone may name it: nothing is loaded then."""
    users = set()
    for name, tree in TREES.items():
        skipped = typing_only(tree)
        for node in nodes_of(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and node not in skipped:
                users |= {name for module in imports(node) if module.split(".")[0] == library}
    assert users <= OUTSIDE[library]


def test_the_ground_floor_needs_nothing_but_numpy_and_the_standard_library():
    ground = [
        name
        for name in ORDER
        if name.split(".")[0] in ("errors", "base", "optim", "initializers", "admission")
    ]
    for name in ground:
        tops = {module.split(".")[0] for module in imports(TREES[name])}
        assert tops - set(sys.stdlib_module_names) <= {"numpy", "shardemb"} | (
            {"rich"} if name == "base.progress" else set()
        )


HEAVY = ["torch", "zarr", "numba", "llvmlite", "pyarrow", "dask", "rich", "click"]
HEAVY += ["shardemb.storage.files", "shardemb.store", "shardemb.text"]


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, shardemb; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_modules_for_torch_load_little_besides():
    """Numba and the rest come with the first store, so the import takes a tenth of a second beyond that of torch."""
    pytest.importorskip("torch")
    heavy = [name for name in HEAVY if name not in ("torch", "shardemb.storage.files")]
    code = (
        f"import sys, torch; had = set(sys.modules); import shardemb.torch; print([name for name in {heavy} "
    )
    code += "if name in sys.modules.keys() - had])"
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
    ("compute.compiler", "read_bytes"): "source, whose checksum is part of the name of a compiled kernel",
    ("torch.conversion", "load"): "a file of the caller's, to read; no part of a store",
    ("torch.checkpoint", "save"): "into memory",
    ("torch.checkpoint", "load"): "from memory",
    ("compute.compiler", "mkdir"): "a folder for compiled kernels, where numba has none; no part of a store",
    ("compute.compiler", "os.access"): "the same",
    ("compute.compiler", "os.getuid"): "the same",
    ("compute.intrinsics", "load"): "from memory",
    (
        "memory.memory_budget",
        "read_text",
    ): "the memory of the machine and of control groups, below /proc and /sys",
    ("imports.streams", "open"): "files of the caller's, to read; no part of a store",
    ("imports.arrays", "open"): "a member of an archive of the caller's, to read; no part of a store",
    ("imports.tensors", "load"): "files of the caller's, to read; no part of a store",
    ("imports.containers", "open"): "folders of the caller's, to read; no part of a store",
    ("search.evaluation", "open"): "text files of the caller's, to read; no part of a store",
    (
        "search.graph",
        "save",
    ): "a file of the caller's, which usearch writes under the temporary name of an export",
    ("distributed", "open"): "the head, through `store.opening`",
    ("distributed.owner", "open"): "a partition, through `store.partition`",
    ("splitting", "open"): "of stores and partitions, which files.py opens",
    ("store.spreading", "open"): "of partitions, the same",
    ("text", "open"): "text files of the caller's, to read; no part of a store",
    ("memory.output_pool", "remove"): "of a list",
    ("storage.address_space", "os.strerror"): "the text of an error",
    ("storage.address_space", "read_text"): "the kernel's limit of mappings, below /proc",
    ("session.session", "load"): "of the catalogs, which read through files.py",
    ("vocabulary.key_rows", "load"): "of the index, which reads through files.py",
    ("compute.scheduler", "os.sched_getaffinity"): "the cores that a thread may use",
    ("compute.scheduler", "os.sched_setaffinity"): "the same",
    ("quickstart.corpus", "os.walk"): "the standard library's source, which is the corpus",
    ("quickstart.corpus", "tokenize.open"): "the same",
    ("quickstart.training", "mkdir"): "an application's own folder; no part of a store",
}


def touches(tree):
    """Calls that touch the disk: ``open``, ``os.something``, and methods from `TOUCHES`, but not those of files.py."""
    for node in nodes_of(tree):
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
    if name != "storage.files":
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
            isinstance(node, ast.ImportFrom) and node.module == "shardemb.storage.files"
            for node in nodes_of(tree)
        )


# ---- house numbers ----------------------------------------------------------------------------------------------

MAX_LINES, MAX_BODY, MAX_PARAMETERS = 400, 40, 8

FUNCTIONS = [
    (module, node)
    for module, tree in TREES.items()
    for node in nodes_of(tree)
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


@cache
def docstring_lines(tree):
    lines = set()
    for node in nodes_of(tree):
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


HOT_LOOPS = {
    "compute.row_kernels",
    "compute.pooling",
    "compute.intrinsics",
    "compute.residency",
    "compute.row_index",
    "vocabulary.index_kernels",
    "precision.coded_rows",
    "search.kernels",
}


def test_parameters_are_few():
    """But for kernels: they take arrays and numbers one by one, because numba compiles no objects of ours."""
    many = {
        f"{module}.{node.name}": len(parameters(node))
        for module, node in FUNCTIONS
        if module not in HOT_LOOPS and len(parameters(node)) > MAX_PARAMETERS
    }
    many.pop("distributed.store.create_table")  # as the next
    many.pop("store.store.create_table")  # all that is fixed about a table is said there once, by name
    for pooled in ("lookup_bag", "bag_weight_gradient", "update_bag"):  # names and order of torch's arguments
        many.pop(f"store.table.{pooled}", None)
        many.pop(f"store.keyed_table.{pooled}", None)
        many.pop(f"ranks.tables.{pooled}", None)
        many.pop(f"distributed.table.{pooled}", None)
    many.pop("torch.embedding_bag.__init__")  # the same
    many.pop(
        "store.store.import_table"
    )  # how to read a source, and of the new table what no other call changes
    many.pop("cli.import_")
    many.pop("cli.export")  # click passes each option of the command line by name
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
    for node in nodes_of(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
        if isinstance(node, ast.FunctionDef):
            defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            assert not any(isinstance(default, ast.List | ast.Dict | ast.Set) for default in defaults)
