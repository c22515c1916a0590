"""The kept results: what counts as worse, and their pages, which a browser shows without network and errors."""

import copy
import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")

SYNCS = "commit.CommitSyncs.track_syncs"
MEMORY = "lookup.LookupMemory.peakmem_lookup"


@pytest.fixture
def history(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import history

    return history


# ---- check ------------------------------------------------------------------------------------------------------


@pytest.fixture
def check(history, monkeypatch):
    """``check(change)`` returns what `history.check` says of the newest entry after `change` of its results."""

    def check(change):
        measured = copy.deepcopy(max(history._entries(), key=lambda entry: entry["date"]))
        change(measured["results"])
        monkeypatch.setattr(history, "_git", lambda *_: measured["commit_hash"])
        monkeypatch.setattr(history, "_measure", lambda *_: (measured, {}))
        return history.check()

    return check


def test_what_stayed_or_shrank_passes(check):
    assert check(lambda results: None) is None
    assert check(lambda results: results[SYNCS].__setitem__(0, [1])) is None


def test_a_counter_that_grew_is_named_with_both_values(check):
    message = check(lambda results: results[SYNCS].__setitem__(0, [results[SYNCS][0][0] + 1]))
    assert re.search(rf"{re.escape(SYNCS)}\(200000\): 6, was 5\n", message)
    assert message.count("was") == 1
    assert "benchmarks.history add" in message


def test_memory_may_vary_but_not_grow(check):
    def grow(factor):
        return lambda results: results[MEMORY].__setitem__(0, [results[MEMORY][0][0] * factor])

    assert check(grow(1.2)) is None
    assert MEMORY in check(grow(1.4))


@pytest.mark.parametrize(
    "change", [lambda results: results.pop(SYNCS), lambda results: results[SYNCS].__setitem__(0, None)]
)
def test_a_counter_that_was_not_measured_is_worse(check, change):
    assert re.search(rf"{re.escape(SYNCS)}\(200000\): missing, was 5\n", check(change))


def test_every_counter_is_in_the_newest_entry_or_awaits_the_next(history):
    newest = max(history._entries(), key=lambda entry: entry["date"])
    assert newest["results"].keys() == {*history.COUNTERS, *history.OTHERS} - history.AWAITED
    assert history.COUNTERS.keys() >= history.AWAITED
    assert newest["results"].keys() <= json.loads(history.BENCHMARKS.read_text()).keys()


def test_entries_name_no_folder_of_the_machine_that_measured_them(history):
    for path in history.RESULTS.rglob("*.json"):
        assert "/bin/python" not in path.read_text()


# ---- publish ----------------------------------------------------------------------------------------------------


def _run(*command, folder):
    environment = os.environ | dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "a")
    environment |= dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "a@localhost")
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def _publish(folder):
    return _run(sys.executable, "-m", "benchmarks.history", "publish", "pages", folder=folder)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A repository with a commit for each kept entry: the one that has the tests may be without a history."""
    pytest.importorskip("asv")
    if shutil.which("npm") is None:
        pytest.skip("npm brings the scripts of the pages")
    folder = tmp_path_factory.mktemp("published") / "clone"
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks")
    _run("git", "init", "-q", "-b", "main", folder=folder)
    paths = list(folder.glob("benchmarks/results/*/*-existing-*.json"))
    for path in sorted(paths, key=lambda path: json.loads(path.read_text())["date"]):
        entry = json.loads(path.read_text())
        assert _run("git", "commit", "-q", "--allow-empty", "-m", "as it was", folder=folder) == (0, "")
        entry["commit_hash"] = _run("git", "rev-parse", "HEAD", folder=folder)[1].strip()
        path.write_text(json.dumps(entry))
        path.rename(path.with_name(f"{entry['commit_hash'][:8]}-{entry['env_name']}.json"))
    code, output = _publish(folder)
    assert code == 0, output
    assert "lacks" not in output
    return folder


def test_the_pages_load_nothing_from_elsewhere(clone):
    page = (clone / "pages" / "index.html").read_text()
    assert not re.search(r'(src|rel="stylesheet" href)="\w+:', page)
    for name in re.findall(r'<(?:script|link)[^>]*(?:src|href)="([^"]+)"', page):
        assert (clone / "pages" / name).is_file(), name


def test_a_shallow_clone_says_what_it_lacks(clone, tmp_path):
    _run("git", "clone", "-q", "--depth", "1", f"file://{clone}", tmp_path / "shallow", folder=tmp_path)
    for name in ("benchmarks", ".asv"):
        shutil.copytree(clone / name, tmp_path / "shallow" / name)
    entries = len(list(clone.glob("benchmarks/results/*/*-existing-*.json")))
    code, output = _publish(tmp_path / "shallow")
    assert code == 0, output
    assert f"{entries - 1} of {entries} entries are of commits that this clone lacks; it is shallow" in output
    (newest,) = json.loads((tmp_path / "shallow" / "pages" / "index.json").read_text())[
        "revision_to_hash"
    ].values()
    assert newest == _run("git", "rev-parse", "HEAD", folder=clone)[1].strip()


def test_without_a_known_commit_nothing_is_written(clone, tmp_path):
    shutil.copytree(clone / "benchmarks", tmp_path / "benchmarks")
    _run("git", "init", "-q", "-b", "main", folder=tmp_path)
    _run("git", "commit", "-q", "--allow-empty", "-m", "another", folder=tmp_path)
    code, output = _publish(tmp_path)
    assert code == 1
    assert "they are elsewhere, or were rewritten" in output
    assert "nothing to publish" in output
    assert not (tmp_path / "pages").exists()


# ---- in a browser -----------------------------------------------------------------------------------------------

PROBE = """<script>
const errors = []
addEventListener("error", event => errors.push(event.message || event.target.outerHTML), true)
setTimeout(() => {
    const report = document.body.appendChild(document.createElement("pre"))
    const plots = [...document.querySelectorAll("*")].map(each => $(each).data("plot")).filter(each => each)
    const coloured = plot => {
        const canvas = plot.getCanvas()
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
        return pixels.some((value, k) => k % 4 == 0 && Math.abs(value - pixels[k + 1]) > 40)
    }
    report.id = "report"
    report.textContent = JSON.stringify({
        errors: errors,
        text: document.body.innerText,
        plots: plots.map(each => ({lines: each.getData().map(line => line.data.length), coloured: coloured(each)})),
    })
}, 5000)
</script>"""
"""Collects errors, and says what was drawn: the points of each line, and whether a pixel has a colour."""


class _Pages(http.server.SimpleHTTPRequestHandler):
    """Serves the pages with the probe in them, and keeps what it did not find."""

    def do_GET(self):
        if self.path != "/":
            super().do_GET()
            return
        page = Path(self.directory, "index.html").read_text().replace("<head>", "<head>" + PROBE).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(page)

    def send_error(self, code, *arguments):
        self.server.missing.append(self.path)
        super().send_error(code, *arguments)

    def log_message(self, *_):
        pass


@pytest.fixture
def browse(tmp_path):
    """``browse(pages, place)`` opens a place of the pages; it returns what the probe found and what was missing."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (Debian: apt-get install chromium)")

    def browse(pages, place):
        handler = functools.partial(_Pages, directory=str(pages))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            server.missing = []
            threading.Thread(target=server.serve_forever).start()
            try:
                shown = _dump(f"http://127.0.0.1:{server.server_port}/{place}", tmp_path)
            finally:
                server.shutdown()
        report = re.search(r'<pre id="report">(.*?)</pre>', shown, re.S)
        return json.loads(html.unescape(report[1])) if report else None, server.missing

    return browse


def _dump(url, folder):
    """Return the document after ten seconds, which take less where nothing happens; other hosts are not found."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=1200,4000"]
    options += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    environment = os.environ | {"HOME": str(folder)}
    done = subprocess.run(
        [CHROMIUM, *options, url], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


def _entries_with(name):
    entries = [json.loads(path.read_text()) for path in ROOT.glob("benchmarks/results/*/*-existing-*.json")]
    return sum(bool(entry["results"].get(name, [None])[0]) for entry in entries)


def test_a_browser_draws_every_graph(clone, browse):
    found, missing = browse(clone / "pages", "")
    assert found["errors"] == missing == []
    benchmarks = json.loads((clone / "pages" / "index.json").read_text())["benchmarks"]
    assert len(found["plots"]) == len(benchmarks)
    lines = [each for each in found["plots"] if max(each["lines"]) > 1]  # a single entry is no line yet
    assert len(lines) > 10
    assert all(each["coloured"] for each in lines)


def test_a_browser_draws_a_counter_over_all_entries(clone, browse):
    found, missing = browse(clone / "pages", f"#{SYNCS}")
    assert found["errors"] == missing == []
    assert found["plots"][0] == {"lines": [_entries_with(SYNCS)], "coloured": True}


def test_a_browser_lists_every_counter(clone, browse, history):
    found, missing = browse(clone / "pages", "#summarylist")
    assert found["errors"] == missing == []
    assert [name for name in history.COUNTERS.keys() - history.AWAITED if name not in found["text"]] == []


def test_a_page_without_one_of_its_scripts_is_noticed(clone, browse, tmp_path):
    pages = shutil.copytree(clone / "pages", tmp_path / "pages")
    (pages / "jquery.flot.js").unlink()
    found, missing = browse(pages, "")
    assert missing == ["/jquery.flot.js"]
    assert found is None or found["errors"] or not found["plots"]
