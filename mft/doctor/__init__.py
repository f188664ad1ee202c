"""What is installed on this machine, what can run on it, and what to do about what cannot.

`examine` walks through all of it and yields a `finding.Finding` for each thing that was looked at. What costs
nothing is read in this process: `versions`, `machine` (cores, memory, limits), `places` (disks), `network`,
`environment`. What has to be tried (a library that imports, a kernel that runs, two ranks that add up a
number, a store that answers) runs in child processes, each with a time limit, so that a library that crashes
or hangs is a line and not the end: `attempt` is the child, `children` starts it, `abilities` says what its
answers mean. `needs` knows which of them the composed config needs, and `report` shows everything.
"""
