"""`mft train --dry-run`: a run on a small scale, before anything is started.

`child` runs `rehearse` in a process of its own, on the CPU and in a temporary folder: the data report, with
the rows tokenised into the cache; the model on the meta device, with what is trained and what a rank needs of
memory and disk (`estimate`); one real step of a tiny model of the same architecture (`stand_in`) on a few
rows cut short (`short_rows`), with the real adapters, loss and optimizer, a validation and a checkpoint. The
loader, the trainer and the loop are those of a run.
"""
