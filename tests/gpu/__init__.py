"""What only a GPU can show, as cells that are declared once and played on a GPU, or as their twins on a CPU.

    python -m tests.gpu [--device cpu] [--small] [--only A5 …]

`children` forks a child for each cell and prints its JSON line at once. Cells: `machine` (A0), `layouts` (A3, A4:
single forwards of a model of any shape), `trained` (A1, A2, A5 to A7, A13: pairs of whole runs and how far apart
they may be), `commands` (A8 to A11: the command line), `waits` (A12). `cells` puts them in order; `test_cells`
plays the twins. docs/gpu.md says what each shows.
"""
