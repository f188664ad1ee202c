"""One engine for every way of using several devices.

A backend of conf/dist (`ddp.Single`, `ddp.Ddp`, `deepspeed.Zero2`, `deepspeed.Zero3`, `fsdp.Fsdp`) is a
dataclass of settings; its `start` returns the `Engine` of this rank. The loop sees `engine` only and does not
know which one it has. An engine is one of the `ranks`, which sum and wait, and has an `engine_state`, which
is saved. `sharded_state` saves and loads what an exact resume needs, on any number of ranks; `rng` the
random states.
`process_group` starts the group of all backends but one; `heartbeat` lets ranks wait for a slow one without a
collective, and tells a frozen one.
"""
