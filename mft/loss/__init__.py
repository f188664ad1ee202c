"""Loss modes: what a step minimises when its tokens belong to several tasks.

A mode turns the token losses of one micro-batch into its share of the step's objective (`base`). `means` are
the four plain ones, `focal` turns losses down that are small already, `adaptive` is what the modes with
moving task weights have in common (`self_paced`, `coba`, `famo`, `dwa`, `lbtw`, `uncertainty`),
`task_history` what they remember.
"""
