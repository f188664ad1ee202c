"""`mft verify-resume`: is a run that is stopped and resumed the uninterrupted one, to the bit?

`cells` composes and checks every combination of the values on the command line. `attempts` trains a cell
twice, straight through and with a real stop and a resume in new processes. `difference` compares what the
two left behind, and finds the first value that is not the same.
"""
