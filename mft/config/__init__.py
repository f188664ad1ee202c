"""From a command line to a config that can run.

1. `overrides` checks the words of the command line, `compose` hands them to Hydra, which merges the yaml
   files of conf/. What Hydra refuses becomes one sentence: `messages.explained`, with `other_trainers` for
   names that are used elsewhere. `interpolations` are replaced, `places` are made absolute.
2. `schema` types the settings; `components` decides which class a `_target_` may name, `plugins` which
   packages besides mft, and `hydra_node` judges Hydra's own settings by the same rule.
3. `build` makes the components; `validate.check` judges them alone and together, before a process starts or a
   model loads, and returns them. `inert` reports settings that have no effect in this run, by
   the `conditions` of its rules and of what a person set (`given_keys`).
4. `inputs` collects what can change the result, `identity` hashes it: two runs are the same experiment, or
   their differences can be named.

Hydra and OmegaConf are imported here and above, never below.
"""
