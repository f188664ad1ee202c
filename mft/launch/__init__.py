"""From a composed config to running ranks.

`job` checks a config and determines its identity. `launch` gives it a run folder, in which it is frozen, and
runs its ranks there: in separate processes (`spawn`: a fork server with the heavy imports done, watched
by torch's elastic agent), in this very process, or as what torchrun, accelerate launch or srun started
(`placement`). Each rank is `worker.rank_main`, which reads the frozen config and calls `mft.run`.

What can go wrong has a module each: `signals` (asked to stop, exit codes), `failures` (which rank's error is
the cause of the others), `out_of_memory` (which settings to lower), `rank_log` (what each rank prints).
`stacks` shows where a rank stands.
`multinode` lets several machines meet over the store of `network`; `node_group` keeps them together.
`torch_private` holds everything private of torch.
"""
