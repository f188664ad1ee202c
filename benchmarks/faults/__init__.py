"""A campaign of faults: real runs are killed, damaged and starved, and have to end as if nothing had happened.

`setups` draws the configs and trains each once without a fault: the reference. Every fault is played in a new
folder. `kinds` lists what can happen, implemented in `kills`, `damages`, `places`, `limits`, `servers` and
`sweeps`, at a time chosen by `moments`. Then `case` repeats the command until the run has finished, following
the advice of every refusal, and `judge` compares the result with the reference. `processes` starts commands
and finds what they leave behind. `campaign` deals the kinds, records each result as a line and prints the
table. docs/faults.md has the results.
"""
