"""The training step of this project beside those of TRL and LLaMA-Factory, which see the same rows.

`make bench-peers` makes a virtual environment for each peer (`.venv-peers/`, pins in the *.txt here) and runs
`__main__`. That has `work` read the rows and starts a process for each lane: `own_lane` (this project, and
matrix products as the machine's peak) and `peer_lane` (each in its own environment, without this project).
`turns` is what they share: one lane computes at a time, a step each.
"""
