"""The verbs of `mft`, one file each: each turns a command line into calls of the packages below.

Every verb has two functions. `parser()` describes its command line: the module's docstring, and each flag
with its default and a sentence, which `mft VERB --help` prints and `mft completion` offers.
`command(arguments)` parses and does the work. mft/cli.py holds the table of verbs and imports the one that
was typed, so that help and mistakes are answered within a second: torch, transformers, MLflow and Hydra are
imported inside functions, after the command line was understood.

Overrides of the config (key=value) are words of `train`, `plan`, `data`, `verify-resume`, `sweep resume` and
`convert`; everything else is a flag. `arguments` is the parser that all of them share; `trained_model` finds
the model of a run for `merge` and `generate`.
"""
