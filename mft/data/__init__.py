"""From JSONL files to the micro-batches of a step.

1. `task` has the files of a task (`task_files`), `readers` yields their rows (JSONL, compressed, Parquet, the
   hub), `formats` makes messages of a row (`detection` says which format). A row that cannot be read is an
   error or is counted, never dropped in silence.
2. `template` writes messages as segments of text, of which the answers carry loss; `tokenize` makes ids of
   them.
3. `cache/` keeps a task's tokens on disk, once, under a fingerprint of its files and of what shapes them.
4. `mixture` says how often each task's samples come in an epoch, `sampler` puts them in order and deals them
   to ranks, `packing` makes rows of them, in which every token keeps its task and its sample.
5. `loader` yields the micro-batches of a step, of a validation and of a probe; `report` accounts for every
   row.
"""
