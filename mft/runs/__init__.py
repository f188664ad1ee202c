"""Reads finished and running runs back from their folders or from MLflow, ranks them, and reports on them.

`places.at` returns the runs of folders and of MLflow experiments, each once: `folders` reads a run from its
folder, `experiments` those of an experiment, as `results.Run`: config, metrics, state, `facts`. `other_tools`
adds what other programs measured. `differences` finds the keys that tell runs apart, among them the contents
of data and models, not their paths alone. `direction` knows whether a lower or a higher value of a metric is
better.
`ranking` makes groups of runs that differ by their seed, ranks them, and names a winner only where the noise
between seeds allows it. `report` writes the HTML page, whose parts are in `page/`.

Nothing here knows the command line or sweeps: `mft compare`, `mft runs` and `mft show` call it from above,
and a sweep calls `report.leave_report` when it ends.
"""
