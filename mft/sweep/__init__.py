"""`mft train -m`: many jobs from one command line, in one folder, that can be resumed.

`hydra_app` runs Hydra's application, whose plugins (`hydra_plugins`) pass the overrides of every job to
`jobs` (a grid) or `optuna_search` (values that Optuna proposes, of a `search_space`). `composer` composes and
checks all of them before the first starts; `pool` runs them side by side, each under a process of its own
(`supervisor`), and ends those early that are worse than the median. `display` shows them.
`external_launcher` passes jobs to the launcher of another package (SLURM).

`folder` is about the sweep's folder: its id, the folders of its jobs, its lock and the recorded command.
"""
