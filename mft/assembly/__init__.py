"""Makes the objects of a run from its config, for `mft.run` and for a rehearsal.

`start` reads the data and starts the engine; they and the config are the `Run` that all else is given.
`loader` makes the micro-batches, `model` loads the model and decides which layers it recomputes, `trainer`
connects what the loop works on; `micro_batch` finds the largest one that fits. `tags` says what a tracker keeps of it.
"""
