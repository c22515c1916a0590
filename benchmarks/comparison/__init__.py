"""shardemb against what people use instead, workload by workload; `benchmarks/compare.py` is the command for it.

`workloads` lists what is measured. `reading`, `training`, `starting`, `capped`, `committing`, `filling`, `folding` and
`around` measure it, with `peers` and `torches` as wrappers of the other libraries. `racing` takes the times, `machine`
measures what the machine can do, and `report` prints and draws.
"""
