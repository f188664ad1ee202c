"""Compares runs: which setting is better, by how much, and how sure that is.

`compare.compare` makes a `Comparison` of runs. `differences` finds the keys that tell them apart, among them
the contents of data and models; `direction` knows whether a lower or a higher value of a metric is better;
`settings` makes groups of runs that differ by their seed, `baseline` what they are compared with. `rows`
pairs the losses of single validation rows, and `statistics` makes intervals and tests of pairs; it knows
numbers only. `multitask` and `effects` look at tasks and at swept keys, `verdicts` says it in words, and
`notes` what else a reader has to know.

What is known is shown by `ranked_table` (terminal, CSV, Markdown, LaTeX), `compare_json`, and `report`, the
HTML page whose parts are in `page/`. A sweep calls `report.leave_report` when it ends.
"""
