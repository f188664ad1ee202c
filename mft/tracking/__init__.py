"""The record of a run, and the trackers that show it.

Every run writes metrics.jsonl into its folder (`base.Jsonl`): that file is the record, and trackers show it.
`base.Tracker` is their contract, `base.FanOut` passes every call to those that tracking= names.

`tensorboard` writes event files. `mlflow` starts a thread in which `sender` reads everything after the
position saved in mlflow.json (`record`), sends it in batches and saves the new position; a store that is down
makes the thread wait, never the training. `mft tracking sync` runs the same sender on demand, for a finished
run and a store that missed part or all of it. The sender itself sends points, parameters, tags and a
description of the run (`note`); `uploads` sends its files, its tasks (`datasets`) and its checkpoints
(`models`). `view` is what the page of an experiment is opened with, `store` knows how a store is reached and
when its database cannot be used, `params` which names and values a store accepts.
"""
