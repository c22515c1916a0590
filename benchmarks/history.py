"""The history of what is measured: one entry for each landed state, in asv's own files below `benchmarks/results/`.

    python -m benchmarks.history add [COMMIT]      measure a commit (HEAD), and keep that as an entry
    python -m benchmarks.history check             does the package that is installed need more than the newest entry?
    python -m benchmarks.history publish [FOLDER]  all entries as web pages that need no network

An entry has counters, peak memory, ratios to a peer in the same process, and a few times. `check` looks only at what
does not depend on the machine.
"""

import argparse
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
BENCHMARKS = RESULTS / "benchmarks.json"
SCRIPTS = ROOT / ".asv" / "scripts"

EXACT, READS, MEMORY = 1.0, 1.05, 1.3
"""How many times as large as in the newest entry a number may be."""

COUNTERS = {
    "cold.Warming.track_bytes_read_per_byte": READS,
    "cold.WholeRowWrite.track_bytes_read": EXACT,
    "commit.CommitBytes.track_bytes_per_changed_row": EXACT,
    "commit.CommitSyncs.track_syncs": EXACT,
    "durability.Fold.track_bytes_per_changed_row": EXACT,
    "durability.Fold.track_syncs": EXACT,
    "durability.FoldOfCommits.track_bytes_per_changed_byte": EXACT,
    "durability.Paging.track_bytes_written_per_row": EXACT,
    "opening.Open.track_files": EXACT,
    "starting.SecondStart.track_kernels_compiled": EXACT,
    "starting.SecondStart.track_kernels_found": EXACT,
    "starting.track_heavy_imports": EXACT,
    "tasks.Tasks.track_lookup_tasks": EXACT,
    "tasks.Tasks.track_update_tasks": EXACT,
    "lookup.LookupMemory.peakmem_lookup": MEMORY,
}
"""What `check` measures: benchmarks whose numbers are the same on every machine, or nearly so."""

AWAITED: set[str] = set()
"""Counters that are newer than the newest entry, so `check` has nothing to compare them with. The next one has them."""

OTHERS = [
    "opening.Open.track_disk_bytes",
    "opening.Open.time_open_and_look_up",
    "ratios.LookupRatio.track_lookup_out_vs_take",
    "ratios.LookupRatio.track_lookup_vs_index",
    "ratios.TrainingRatio.track_step_vs_numpy",
]
"""What an entry has besides: disk space, ratios to a peer, and a time, which is of the machine that the entry names."""


def add(commit):
    """Measure a commit with the benchmarks of today, and write its entry."""
    commit = _git("rev-parse", commit)
    with tempfile.TemporaryDirectory() as folder:
        _unpack(commit, Path(folder, "package"))
        entry, benchmarks = _measure(Path(folder), commit, [*COUNTERS, *OTHERS])
    machine = {name: value for name, value in entry["params"].items() if name != "python"}
    target = RESULTS / machine["machine"] / f"{commit[:8]}-{entry['env_name']}.json"
    _write(target, entry)
    _write(target.parent / "machine.json", machine | {"version": 1})
    # An old package may lack what some benchmark needs, which asv then does not list.
    _write(BENCHMARKS, (_read(BENCHMARKS) if BENCHMARKS.exists() else {}) | benchmarks)
    print(f"wrote {os.path.relpath(target)}; commit it, and the other files of {os.path.relpath(RESULTS)}")


def check():
    """Measure the counters of the package that is installed; return an error message if one has grown."""
    newest = max(_entries(), key=lambda entry: entry["date"])
    print(f"measuring, to compare with the entry of {newest['commit_hash'][:8]}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        names = [name for name in COUNTERS if name not in AWAITED]
        measured, _ = _measure(Path(folder), _git("rev-parse", "HEAD"), names)
    worse = list(_grown(_numbers(newest), _numbers(measured)))
    if not worse:
        return None
    return "\n".join(
        [
            "worse than the newest entry of benchmarks/results/:",
            *(f"  {name}: {now}, was {before}" for name, before, now in worse),
            "If that is meant: commit the change, saying why; `python -m benchmarks.history add`; commit the entry.",
        ]
    )


def publish(folder):
    """Write the web pages; return an error message if no entry is of a commit that this clone has."""
    known = set(_git("rev-list", "--first-parent", "HEAD").split())
    commits = [entry["commit_hash"] for entry in _entries()]
    lacking = len([commit for commit in commits if commit not in known])
    if lacking:
        shallow = _git("rev-parse", "--is-shallow-repository") == "true"
        why = "it is shallow: `git fetch --unshallow`" if shallow else "they are elsewhere, or were rewritten"
        print(f"{lacking} of {len(commits)} entries are of commits that this clone lacks; {why}", flush=True)
    if lacking == len(commits):
        return "nothing to publish"
    configured = ["--config", HERE / "history.conf.json"]
    _asv(*configured, "publish", "HEAD", "--no-pull", "--html-dir", folder.absolute())
    _use_local_scripts(folder)
    print(f"wrote {folder}; look at it with `python -m http.server --directory {folder}`")
    return None


# ---- measuring --------------------------------------------------------------------------------------------------


def _measure(folder, commit, names):
    """Run asv in a folder for what is installed, or for the package that lies there; return what it wrote."""
    left_out = shutil.ignore_patterns("results", "scripts", "__pycache__")
    shutil.copytree(HERE, folder / "benchmarks", ignore=left_out)
    settings = json.loads(re.sub(r"^ *//.*$", "", (ROOT / "asv.conf.json").read_text(), flags=re.M))
    _write(folder / "asv.conf.json", settings | {"repo": str(ROOT), "results_dir": "results"})
    environment = os.environ | {"SHARDEMB_BENCH_SCALE": "0.05"}  # the default: other sizes are not compared
    if (folder / "package").exists():
        paths = os.pathsep.join(str(folder / "package" / place) for place in ("", "src"))
        environment["PYTHONPATH"] = paths
        _remove_what_cannot_be_imported(folder, environment)
    if "PYTHONPATH" in environment:
        environment["ASV_PYTHONPATH"] = environment["PYTHONPATH"]  # which asv itself passes on
    chosen = [option for name in names for option in ("-b", rf"^{re.escape(name)}(\(|$)")]
    python = ["-E", f"existing:{sys.executable}", "--set-commit-hash", commit, "--no-pull"]
    # Its exit status is 2 if a benchmark failed; that has no number then, which is told later.
    options = ["--show-stderr", *python, *chosen]
    _asv("--config", folder / "asv.conf.json", "run", *options, check=False, env=environment)
    results = folder / "results"
    (written,) = results.glob(f"*/{commit[:8]}-*.json")
    found = _read(results / "benchmarks.json")
    benchmarks = {name: found[name] for name in [*names, "version"] if name in found}
    return _without_paths(_read(written)), benchmarks


def _without_paths(entry):
    """Name the interpreter by its version; asv uses its path for an environment that exists."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    params = entry["params"] | {"python": version}
    return entry | {"env_name": f"existing-py{version}", "python": version, "params": params}


def _unpack(commit, folder):
    """Write the package of a commit, which was below `src` once, into a folder."""
    places = _git("ls-tree", "--name-only", commit, "shardemb", "src").split()
    command = ["git", "archive", commit, *places]
    archive = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")


def _remove_what_cannot_be_imported(folder, environment):
    """Leave those benchmarks out whose modules need more than an old package has; asv would run none at all."""
    for module in (folder / "benchmarks").glob("[a-z]*.py"):
        command = [sys.executable, "-c", f"import benchmarks.{module.stem}"]
        ran = subprocess.run(command, cwd=folder, env=environment, check=False, stderr=subprocess.DEVNULL)
        if ran.returncode != 0:
            print(f"not with this package: {module.stem}", flush=True)
            module.unlink()


# ---- comparing --------------------------------------------------------------------------------------------------


def _entries():
    return [_read(path) for path in RESULTS.glob("*/*-existing-*.json")]


def _numbers(entry, names=COUNTERS):
    """Return what an entry has: by benchmark and parameters, or None where it failed or was skipped."""
    numbers = {}
    for name in set(names) & entry["results"].keys():
        result = dict(zip(entry["result_columns"], entry["results"][name], strict=False))
        parameters = list(itertools.product(*result["params"]))
        values = result["result"] or [None] * len(parameters)
        for each, value in zip(parameters, values, strict=True):
            numbers[name, each] = None if value is None or math.isnan(value) else value
    return numbers


def _grown(before, now):
    """Yield what is larger than it may be, or is missing, as its name, the old value and the new one."""
    for name, parameters in sorted(before.keys() | now.keys()):
        old, new = (numbers.get((name, parameters)) for numbers in (before, now))
        if new is None or old is None or new > old * COUNTERS[name]:
            yield f"{name}({', '.join(parameters)})", _shown(old), _shown(new)


def _shown(value, digits=8):
    if value is None:
        return "missing"
    return f"{int(value):,}" if value == int(value) else f"{value:,.{digits}g}"


def table():
    """Return the newest entry as a table in Markdown, next to the oldest value of each number."""
    oldest = {}
    entries = sorted(_entries(), key=lambda entry: entry["date"])
    units = _read(BENCHMARKS)
    lines = ["| benchmark | parameters | first | newest | |", "|---|---|---:|---:|---|"]
    for entry in entries:
        numbers = _numbers(entry, [*COUNTERS, *OTHERS])
        oldest = {key: value for key, value in numbers.items() if value is not None} | oldest
    for (name, parameters), value in sorted(numbers.items()):
        first, newest = (_shown(each, digits=4) for each in (oldest.get((name, parameters)), value))
        lines.append(f"| `{name}` | {', '.join(parameters)} | {first} | {newest} | {units[name]['unit']} |")
    return "\n".join(lines)


# ---- publishing -------------------------------------------------------------------------------------------------


PACKAGES = {
    "jquery@3.3.1": {"dist/jquery.min.js": "jquery-3.3.1.min.js"},
    "flot@0.8.3": {f"jquery.flot{part}.js": "" for part in ("", ".time", ".selection", ".categories")},
    "flot-orderbars@1.0.0": {"js/jquery.flot.orderBars.js": ""},
    "stupid-table-plugin@1.1.3": {"stupidtable.min.js": ""},
    "blueimp-md5@2.19.0": {"js/md5.min.js": ""},
    "bootstrap@3.1.1": {"dist/js/bootstrap.min.js": "", "dist/css/bootstrap.min.css": ""},
}
"""What asv's page loads, by package of npm: the files, and their names in the page where those differ."""


def _fetch_scripts():
    """Fill `SCRIPTS` from the packages, unless it is filled."""
    SCRIPTS.mkdir(parents=True, exist_ok=True)
    for package, names in PACKAGES.items():
        if all((SCRIPTS / (name or Path(path).name)).exists() for path, name in names.items()):
            continue
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                ["npm", "pack", package, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL
            )
            (archive,) = Path(folder).glob("*.tgz")
            with tarfile.open(archive) as packed:
                for path, name in names.items():
                    content = packed.extractfile(f"package/{path}").read()
                    (SCRIPTS / (name or Path(path).name)).write_bytes(content)


def _use_local_scripts(folder):
    """Give asv's page its scripts from packages, so that it loads none from the network."""
    _fetch_scripts()
    page = (folder / "index.html").read_text()

    def local(found):
        name = found["url"].rpartition("/")[2]
        if not (SCRIPTS / name).exists():
            name = name.replace(".min", "")
        shutil.copy(SCRIPTS / name, folder)
        return f'{found["attribute"]}="{name}"'

    reference = (
        r'(?P<attribute>src|href)="(?P<url>https:[^"]+\.(?:js|css))" integrity="[^"]*" crossorigin="\w+"'
    )
    (folder / "index.html").write_text(re.sub(reference, local, page))


# ---- programs ---------------------------------------------------------------------------------------------------


def _git(*arguments):
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


def _asv(*arguments, check=True, env=None):
    subprocess.run([sys.executable, "-m", "asv", *map(str, arguments)], check=check, env=env)


def _write(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document) + "\n")


def _read(path):
    return json.loads(path.read_text())


def main():
    parser = argparse.ArgumentParser(
        prog="benchmarks.history", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("add").add_argument("commit", nargs="?", default="HEAD")
    commands.add_parser("check")
    pages = ROOT / "docs" / "_build" / "html" / "history"
    commands.add_parser("publish").add_argument("folder", nargs="?", type=Path, default=pages)
    arguments = vars(parser.parse_args())
    sys.exit(globals()[arguments.pop("command")](**arguments))


if __name__ == "__main__":
    main()
