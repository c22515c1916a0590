"""The documents cannot rot: every block of code in them runs, every link leads somewhere.

In README.md and docs/**/*.md a fence says by its language what is done with it:

- ``python``: executed, block after block in one namespace a document, in an empty folder; a block that begins with
  ``>>>`` is a doctest, and its output is compared;
- ``console``: what stands behind ``$`` is given to the shell in the same folder, and its output is compared;
- anything else (``sh``, ``text``, ``json``, ...): shown.

A python or console block that cannot run here has a comment right before it, ``<!-- not run: the reason -->``, or
``<!-- needs MODULE -->`` if it runs where that module is installed. Both are counted below.
"""

import ast
import doctest
import importlib.util
import inspect
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import click.testing
import numpy as np
import pytest

import shardemb
from shardemb import cli

ROOT = Path(__file__).parent.parent
TOP = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*(ROOT / name for name in TOP), *(ROOT / "docs").rglob("*.md")]
    if "_build" not in path.parts
)
NOT_RUN = 0
"""Blocks with a reason not to be run."""
NEEDING = 10
"""Blocks that run only where a module is installed."""

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS

COMMANDS = ("pip install . && shardemb quickstart", 'pip install ".[test]" && pytest')


# ---- blocks of code in documents


@dataclass(frozen=True)
class Block:
    document: str
    line: int
    """Of its first line of code, counted from 1."""
    language: str
    code: str
    reason: str | None
    """Not to be run, because."""
    needs: str | None
    """Module without which it is not run."""

    @property
    def name(self):
        return f"{self.document}:{self.line}"

    @property
    def executable(self):
        return self.language in ("python", "console")


FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=indent)(?P=fence)`*\s*$",
    re.M | re.S,
)
COMMENT = re.compile(r"<!-- (?:not run: (?P<reason>[^\n]+?)|needs (?P<needs>\w+)) -->\s*\Z")


def blocks_of(document):
    text = (ROOT / document).read_text()
    blocks = []
    for found in FENCE.finditer(text):
        comment = COMMENT.search(text[: found.start()])
        blocks.append(
            Block(
                document=document,
                line=text[: found.start("code")].count("\n") + 1,
                language=found["language"].strip(),
                code=re.sub(rf"^{found['indent']}", "", found["code"], flags=re.M),
                reason=comment["reason"] if comment else None,
                needs=comment["needs"] if comment else None,
            )
        )
    return blocks


BLOCKS = {document: blocks_of(document) for document in DOCUMENTS}


def run_python(block, namespace):
    if not block.code.lstrip().startswith(">>>"):
        exec(compile("\n" * (block.line - 1) + block.code, block.document, "exec"), namespace)
        return
    example = doctest.DocTestParser().get_doctest(
        block.code, namespace, block.name, block.document, block.line - 1
    )
    run_doctest(example, clear=False)
    namespace.update(example.globs)


def run_console(block):
    """Run the commands one by one and compare what they print, stderr behind stdout, as a doctest would."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "COLUMNS": "100", "NO_COLOR": "1"}
    commands = re.findall(r"^\$ (.*(?:\\\n.*)*)\n((?:(?!\$ ).*\n)*)", block.code, re.M)
    assert len(commands) == len(re.findall(r"^\$", block.code, re.M)) > 0, block.name
    for command, expected in commands:
        if re.fullmatch(r"shardemb [\w /.:=-]+", command):
            # It needs no shell, and this process is quicker than a new one.
            runner = click.testing.CliRunner(env=environment)
            ran = runner.invoke(cli.main, shlex.split(command)[1:], prog_name="shardemb")
            got = ran.stdout + ran.stderr
        else:
            done = subprocess.run(
                ["bash", "-c", command],
                env=environment,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            got = done.stdout + done.stderr
        same = doctest.OutputChecker().check_output(expected, got, OPTIONS)
        assert same, f"{block.name}: $ {command}\nexpected:\n{expected}\ngot:\n{got}"


def run_doctest(example, *, clear=True):
    report = []
    doctest.DocTestRunner(optionflags=OPTIONS, verbose=False).run(
        example, out=report.append, clear_globs=clear
    )
    assert not report, "".join(report)


def close_stores(namespace):
    """Give up what an example left open, without the warnings that this deserves elsewhere."""
    for value in list(namespace.values()):
        if isinstance(value, shardemb.Store):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                value.close()


def is_installed(name):
    """Whether there is such a library; a folder of tests may have the same name."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if any(b.executable for b in BLOCKS[name])])
def test_code_in_documents_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, before = {"__name__": "__main__"}, dict(os.environ)
    try:
        for block in BLOCKS[document]:
            if block.reason or (block.needs and not is_installed(block.needs)):
                continue
            if block.language == "python":
                run_python(block, namespace)
            elif block.language == "console":
                run_console(block)
    finally:
        close_stores(namespace)
        os.environ.clear()  # clusters set variables for the processes that they start
        os.environ.update(before)


def test_blocks_not_run_are_counted():
    blocks = [block for each in BLOCKS.values() for block in each]
    assert len([block.name for block in blocks if block.reason]) == NOT_RUN
    assert len([block.name for block in blocks if block.needs]) == NEEDING


def test_every_fence_is_closed_and_names_its_language():
    languages = {
        "python",
        "console",
        "sh",
        "dockerfile",
        "text",
        "json",
        "{include} ../../ARCHITECTURE.md",
        "{toctree}",
        "{eval-rst}",
        "{raw} html",
        *(f"{{literalinclude}} ../../examples/{path.name}" for path in (ROOT / "examples").glob("*.py")),
    }
    for document, blocks in BLOCKS.items():
        fences = re.findall(r"^ *`{3,}", (ROOT / document).read_text(), re.M)
        assert len(fences) == 2 * len(blocks), document
        for block in blocks:
            assert block.language in languages, block.name


# ---- examples in docstrings


PUBLIC_MODULES = (shardemb, shardemb.optim, shardemb.initializers, shardemb.dtypes, shardemb.text)


def public_objects():
    """Names of all public classes and functions, by where they are defined."""
    names = set()
    for module in PUBLIC_MODULES:
        public = [getattr(module, name) for name in module.__all__]
        names |= {f"{each.__module__}.{each.__qualname__}" for each in public if callable(each)}
    return names


OPTIONAL = {
    "torch": ("shardemb.torch", "shardemb.ranks", "shardemb.dynamicemb"),
    "distributed": ("shardemb.distributed",),
}
"""By library: modules that cannot be imported without it."""


def docstring_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    without = [name for library, names in OPTIONAL.items() if not is_installed(library) for name in names]
    for info in pkgutil.walk_packages(shardemb.__path__, "shardemb.", onerror=lambda name: None):
        if info.name.startswith(tuple(without)):
            continue
        module = import_module(info.name)
        yield from finder.find(module, extraglobs={"__name__": info.name})
    yield from finder.find(shardemb, globs={})


EXAMPLES = {example.name: example for example in docstring_examples() if example.examples}


def is_public(name):
    """Whether a docstring is that of a public module or object, or of one of its methods."""
    modules = {module.__name__ for module in PUBLIC_MODULES}
    return name in modules or bool({name, name.rpartition(".")[0]} & public_objects())


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    example = EXAMPLES[name]
    monkeypatch.chdir(tmp_path)
    if is_public(name):
        example.globs.clear()  # a reader has no more than this either
    example.globs.update(shardemb=shardemb, np=np, tmp=tmp_path)
    facades = r"shardemb\.store\.\w+\.(Store|Table|Vocabulary|KeyedTable)\.\w+"
    if re.fullmatch(facades + r"|.*\.PendingCommit|shardemb\.dtypes\.\w+", name):
        store = shardemb.open(tmp_path / "example.zarr")
        table = store.create_table(
            "tokens", num_embeddings=1000, embedding_dim=4, optimizer=shardemb.optim.Adam()
        )
        if ".KeyedTable." in name:
            users = store.create_vocabulary("users", key_type="int64")
            users.add([1234567890123, -5])
            table = store.create_table(
                "users", vocabulary="users", embedding_dim=2, optimizer=shardemb.optim.SGD(), counters=True
            )
            table.update([-5], [[1.0, 2.0]])
        elif ".Vocabulary." in name:
            words = store.create_vocabulary("words", key_type="string")
            words.add(["to", "be", "or", "not"])
            example.globs.update(words=words)
        example.globs.update(store=store, table=table)
        # The table is not committed, and some methods close the store.
        lost = "the changes of .*example.zarr .* are lost"
        warnings.filterwarnings("ignore", lost, RuntimeWarning)  # pytest puts the filters back
    if name.startswith("shardemb.text.Encoder."):
        store = shardemb.open(tmp_path / "example.zarr")
        vocabulary = store.create_vocabulary("words", key_type="string", reserved=2)
        example.globs.update(store=store, encoder=shardemb.text.Encoder(vocabulary))
    try:
        run_doctest(example, clear=False)
    finally:
        close_stores(example.globs)
        example.globs.clear()


def test_every_public_method_has_an_example():
    for cls in (shardemb.Store, shardemb.Table, shardemb.text.Encoder):
        for name, member in inspect.getmembers(cls, inspect.isfunction):
            if not name.startswith("_") and member.__qualname__ == f"{cls.__name__}.{name}":
                assert f"{cls.__module__}.{cls.__name__}.{name}" in EXAMPLES, name


# ---- links

LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


def anchors(text):
    headings = re.findall(r"^#+ +(.+?)\s*$", re.sub(FENCE, "", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_resolve(document):
    text = (ROOT / document).read_text()
    for link in LINK.findall(re.sub(FENCE, "", text)):
        if link.startswith(("https://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / document).parent / target if target else ROOT / document
        assert path.exists(), f"{document}: {link}"
        assert ROOT in path.resolve().parents, f"{document}: {link} leaves the project"
        if anchor:
            assert anchor in anchors(path.read_text()), f"{document}: {link}"


# ---- what stands where


def test_readme_begins_with_the_two_commands():
    first_screen = (ROOT / "README.md").read_text().splitlines()[:24]
    assert [line for line in first_screen if line.startswith(("pip ", "$ "))] == list(COMMANDS)


def test_every_error_and_public_name_is_in_the_reference():
    errors = (ROOT / "docs/reference/errors.md").read_text()
    for name in shardemb.__all__:
        if name.endswith("Error"):
            assert f"`{name}`" in errors, name


SOURCE = Path(shardemb.__file__).parent


def module_name(path):
    """The dotted name below the package: ``storage.files``, and ``storage`` for the folder itself."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


TREES = {
    module_name(path): ast.parse(path.read_text())
    for path in SOURCE.rglob("*.py")
    if path != SOURCE / "__init__.py"
}


def imported(module, nodes):
    """The modules of the package that are imported by some nodes of one of its modules."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "shardemb":
            for each in node.names:
                inner = f"{node.module}.{each.name}".removeprefix("shardemb.")
                yield inner if inner in TREES else node.module.removeprefix("shardemb.")


def architecture():
    return (ROOT / "ARCHITECTURE.md").read_text()


def listed_modules():
    """The modules in the list of files of ARCHITECTURE.md, from top to bottom."""
    files = next(block.code for block in BLOCKS["ARCHITECTURE.md"] if block.language == "text")
    listed, folder = [], ""
    for line in files.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        listed.append(f"{folder}{name}".replace("/", ".") if line.startswith(" ") else name.rstrip("/"))
    return listed


def test_the_list_of_files_is_true():
    """Every module is in ARCHITECTURE.md, and imports only what is listed below it."""
    listed = listed_modules()
    assert sorted(listed) == sorted(TREES)
    for module, tree in TREES.items():
        for other in imported(module, tree.body):  # not what is imported for types, or when first needed
            if other == module.split(".")[0]:
                continue  # its own folder, for a name that the folder defines
            assert listed.index(module) < listed.index(other), (module, other)


def test_the_table_of_folders_is_true():
    """It says of every folder exactly which others it imports from, and each of these stands below it."""
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|", architecture(), re.M)
    stated = {name: re.findall(r"`(\w+)`", others) for name, others in rows}
    folders = list(dict.fromkeys(name.split(".")[0] for name in listed_modules()))
    assert list(stated)[: len(folders)] == folders
    for folder in folders:
        found = {
            other.split(".")[0]
            for module, tree in TREES.items()
            if module.split(".")[0] == folder
            for other in imported(module, ast.walk(tree))
        }
        assert set(stated[folder]) == found - {folder}, folder
        assert all(folders.index(folder) < folders.index(other) for other in stated[folder])


def defined_names():
    """Modules, ``module.name`` and ``Class.member``, a module with its folder or without it."""
    for module, tree in TREES.items():
        yield module
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield f"{module.split('.')[-1]}.{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}.{member.name}" for member in node.body if hasattr(member, "name"))
                yield from (
                    f"{node.name}.{field.target.id}" for field in node.body if hasattr(field, "target")
                )


def test_names_in_the_architecture_exist():
    names = re.findall(r"`([A-Za-z]\w*\.\w+)`", re.sub(FENCE, "", architecture()))
    assert len(names) > 60
    assert set(names) <= set(defined_names())


def test_decisions_are_numbered_and_complete():
    records = sorted((ROOT / "docs/adr").glob("[0-9]*.md"))
    assert [int(path.name[:4]) for path in records] == list(range(1, len(records) + 1))
    for path in records:
        headings = re.findall(r"^## (.+)$", path.read_text(), re.M)
        assert headings == ["Context", "Decision", "Rejected", "Evidence"], path.name


# ---- the project speaks of itself alone

# Written so that this file does not hold them either.
FORBIDDEN = re.compile(
    r"(?<![\w.])/wor[k]/|share[d]/reference|\.\./share[d]|DESIG[N]\.md|issue[s] show|issu[e] #?\d"
    r"|pyp[i]\.org|pythonhoste[d]\.org|conda\.anacond[a]",
    re.IGNORECASE,
)


def tracked_files():
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_no_word_of_the_place_where_it_was_written():
    for path in {*tracked_files(), *SOURCE.rglob("*.py")}:
        found = FORBIDDEN.search(path.read_bytes().decode(errors="replace"))
        assert not found, f"{path}: {found[0]!r}"
