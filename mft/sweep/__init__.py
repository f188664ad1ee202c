"""`mft train -m`: the command and folder of a sweep, its jobs, the processes that run them, and what a person sees."""
