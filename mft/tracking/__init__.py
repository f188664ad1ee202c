"""The record of a run, and the trackers that show it.

Every run writes metrics.jsonl into its folder (`base.Jsonl`): that file is the record, and trackers show it.
`base.Tracker` is their contract, `base.FanOut` passes every call to those that tracking= names.

`tensorboard` writes event files. `mlflow` starts a thread in which `sender` reads what lies behind the place
it saved in mlflow.json (`record`), sends it in batches and saves the new place; a store that is down makes
the thread wait, never the training. `mft tracking sync` runs the same sender by hand, for a run that is over
and a store that missed part or all of it. `store` holds how a store is reached and when its database cannot
be used, `params` which names and values a store accepts.
"""
