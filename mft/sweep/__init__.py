"""`mft train -m`: many jobs from one command line, in one folder, that can be resumed.

`hydra_app` runs Hydra's application, whose plugins (`hydra_plugins`) hand the overrides of every job to
`jobs` (a grid) or `optuna_search` (values that Optuna proposes). `composer` composes and checks all of them
before the first starts; `pool` runs them side by side, each under a supervisor process of its own, and
`display` shows them. `median_rule` says which one is to end early. `external_launcher` hands jobs to the
launcher of another package (SLURM).

`folder` knows the sweep's folder: its id, the folders of its jobs, its lock and the command kept in it.
"""
