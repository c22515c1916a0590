"""shardemb against what people use instead, workload by workload; `benchmarks/compare.py` is its command.

`workloads` lists what is measured; `reading`, `training`, `capped`, `committing` and `around` measure; `peers` and
`torches` wrap the others; `racing` takes the times; `machine` says what the device can do; `report` prints and draws.
"""
