"""Reads finished and running runs back from their folders or from MLflow, ranks them, and reports on them.

`results` reads a run back from its folder, or all runs of an MLflow experiment, as `Run`: its config, its
metrics, its state. `differences` finds the keys that tell runs apart, among them the contents of data and
models, not their paths alone. `direction` knows whether a lower or a higher value of a metric is better.
`ranking` makes groups of runs that differ by their seed, ranks them, and names a winner only where the noise
between seeds allows it. `report` writes the HTML page, whose parts are in `page/`.

Nothing here knows the command line or sweeps: `mft compare`, `mft runs` and `mft show` call it from above,
and a sweep calls `report.leave_report` when it ends.
"""
