"""Reads finished and running runs back from their folders or from MLflow.

`places.at` returns the runs of folders and of MLflow experiments, each once: `folders` reads a run from its
folder, `experiments` those of an experiment, as `results.Run`: config, metrics, state, `facts`. `other_tools`
adds what other programs measured.

Nothing here knows what runs are compared by (`mft.comparison`), the command line or sweeps.
"""
