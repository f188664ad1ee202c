"""Everything that is printed: lines and tables in one style, without control characters and without
passwords.

`screen` prints, `tables` draws, `credentials` knows what must not be shown, and `streams` keeps a closed pipe
from ending a run.
"""
