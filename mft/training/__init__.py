"""The training loop and what it keeps.

`loop.fit` is the order of events of a step, on one page. It works on a `trainer.Trainer`, whose methods are
the single actions; `state` is where the run stands, `best` which validations were the best, `nonfinite` what
happens to a step that must not be applied, `metrics` what is measured, `validate` how a validation is made.
`checkpoint` writes and restores, `resume` finds the newest checkpoint that is as it was written.
What a person sees: `progress` while it runs, `summary`, `plots` and `sample_answers` when it ends.

Nothing here knows a choice of conf/: floors below are seen by their contracts (`loss.base`,
`distributed.engine`,
`tracking.base`).
"""
