"""The training loop and what it keeps.

`loop.fit` is the order of events of a step, on one page. It works on a `trainer.Trainer`, whose methods are
the single actions; `state` is the position of the run, `best` tracks the best validations, `nonfinite`
decides about a step that must not be applied, `metrics` sums what is measured, `validate` makes a validation,
`sample_losses` keeps the losses of its rows. `prefetch` makes the micro-batches of the next step ready.
`final_test` is the test of a finished run. `checkpoint` writes and restores, `weights_only` reduces older
ones, `resume` finds the newest undamaged checkpoint. For people: `progress` while it runs, `summary`, `plots`
and `sample_answers` when it ends.

Nothing here knows a choice of conf/: the floor below is seen through its contracts (`loss.base`,
`distributed.engine`, `tracking.base`).
"""
