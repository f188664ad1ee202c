"""`mft plan`: whether a run fits, how long it takes and what to change, before anything is started.

`case` composes and checks the config for a device of `gpus`. `weights` counts its weights,
`memory` says what a rank needs, `data` how many tokens and steps there are, `time` and `rates` how long a step
takes; `plan` puts these together, and `advice` plans changed configs where it does not fit. `answer` walks
through all of it, `report` and `as_json` show it.
"""
