"""A stand-in for srun of SLURM, which is not here: starts the tasks of a step with the environment that srun
gives.

    python -m tests.launch.srun [options, which are ignored] COMMAND …

Two tasks on this machine. SIGTERM goes on to all of them, as it does before a job's time is over; the exit
code is the largest of the tasks, as srun's is.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

TASKS = 2
SECONDS = 600.0
"""How long a step may take."""


def environment(task: int) -> dict[str, str]:
    """Returns the variables of one task, as srun sets them for a step of TASKS tasks on one node of a job."""
    values = {
        "JOB_ID": os.getpid(),  # the port of the ranks follows from it
        "JOB_NODELIST": "localhost",
        "NODELIST": "localhost",
        "NNODES": 1,
        "NODEID": 0,
        "NTASKS": TASKS,
        "PROCID": task,
        "LOCALID": task,
        "STEP_ID": 0,
        "STEP_NUM_TASKS": TASKS,
        "STEP_NODELIST": "localhost",
        "STEP_TASKS_PER_NODE": TASKS,
        "TASKS_PER_NODE": TASKS,
        "LAUNCH_NODE_IPADDR": socket.gethostbyname("localhost"),
    }
    return {f"SLURM_{name}": str(value) for name, value in values.items()}


def main(arguments: list[str]) -> int:
    command = arguments[next(i for i, word in enumerate(arguments) if not word.startswith("-")) :]
    tasks = [subprocess.Popen(command, env=os.environ | environment(task)) for task in range(TASKS)]
    signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
    return max(task.wait(SECONDS) % 256 for task in tasks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
