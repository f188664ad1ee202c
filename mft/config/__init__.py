"""From a command line to a config that can run.

1. `overrides` reads the words of the command line, `compose` hands them to Hydra, which merges the yaml files
of conf/.
   What Hydra refuses is reported as a sentence (`messages`, `places`, `other_trainers`,
   `interpolations`).
2. `schema` types the settings; `components` says which class a `_target_` may name, `plugins` which packages
of others.
3. `build` makes the components; `validate.check` judges them alone and together, before a process starts or a
model
   loads, and returns them. `inert` says which settings do nothing in this run.
4. `inputs` collects what can change the result, `identity` hashes it: two runs are the same experiment, or
differ in
   what is named.

Hydra and OmegaConf are imported here and above, and nowhere below.
"""
