"""Compare shardemb with what people use instead, and with the limits of the machine; see README.md here.

python benchmarks/compare.py                     everything: 45 minutes, 25 GB of disk
python benchmarks/compare.py --only W1,W3        some workloads only
python benchmarks/compare.py --scale 0.01        does it work? the numbers mean nothing
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.comparison import machine, report, results, workloads
from benchmarks.comparison.data import Settings


def main(arguments=None):
    """Run the command; the exit status is 1 if a workload failed, whether or not bars were met."""
    options = _options().parse_args(arguments)
    names = [name for part in options.only for name in part.split(",")] or list(workloads.WORKLOADS)
    unknown = set(names) - workloads.WORKLOADS.keys()
    if unknown:
        sys.exit(f"no workload {', '.join(sorted(unknown))}; there are {', '.join(workloads.WORKLOADS)}")
    with tempfile.TemporaryDirectory(prefix="compare-", dir=options.folder) as folder:
        measured = machine.calibrate(folder, options.scale)
        print(report.heading(measured), flush=True)
        settings = Settings(Path(folder), options.scale, measured)
        outcomes = workloads.run_all(names, settings, lambda each: print(report.outcome(each), flush=True))
    print(report.summary(outcomes))
    if options.json:
        document = results.as_document(measured, outcomes, {"scale": options.scale})
        options.json.write_text(json.dumps(document, indent=1))
    if options.plot:
        report.plot(outcomes, options.plot)
    return int(any(outcome.error for outcome in outcomes))


def _options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", default=[], metavar="W1,W3", help="only these workloads")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where data is created and deleted again; a real disk",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="size of all tables; 1 for numbers to quote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements, for programs")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw pictures (needs matplotlib)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
