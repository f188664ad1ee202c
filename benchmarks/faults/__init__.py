"""A campaign of faults: real runs are killed, damaged and starved, and have to end as if nothing had happened.

`setups` draws the configs and trains each once without a fault: the reference. A fault is played in a folder
of its own: a `kinds.Kind` strikes (`kills`, `damages`, `places`, `limits`, `servers`, `sweeps`; `moments`
says when), `case` gives the same command again until the run has finished, following the advice of what is
refused, and `judge` compares the result with the reference. `processes` starts commands and finds what they
leave behind. `campaign` deals the kinds, records each result as a line and prints the table. docs/faults.md
has the results.
"""
