"""Kinds of faults: processes that are killed, or asked to stop by signals."""

from __future__ import annotations

import signal

from benchmarks.faults import moments
from benchmarks.faults.case import Case, Failure
from benchmarks.faults.processes import Command

RANKS_UP = tuple(name for name in moments.MOMENTS if name not in ("at start-up", "as the run folder appears"))
"""Moments at which there are ranks."""


def kill_launcher(case: Case) -> None:
    """kill -9 of the launching process: its ranks have to end by themselves."""
    command, moment = _at(case)
    command.send(signal.SIGKILL)
    case.strike(f"kill -9 of the launching process {moment}")
    case.end(command, anything=True)


def kill_rank(case: Case) -> None:
    """kill -9 of one rank: the launching process has to end the others and say it."""
    command, moment = _at(case, *RANKS_UP)
    ranks = command.ranks()
    if not ranks:
        case.strike(f"no rank lived {moment}")
        case.end(command)
        return
    rank = case.draw.choice(sorted(ranks))
    command.send(signal.SIGKILL, ranks[rank])
    case.strike(f"kill -9 of rank {rank} of {len(ranks)} {moment}")
    if case.end(command) == 1:
        case.expects.append(r"mft: Rank \d+ was killed from outside")


def kill_group(case: Case) -> None:
    """kill -9 of the whole process group, as the machine's memory running out or a scheduler may do."""
    command, moment = _at(case)
    command.send_group(signal.SIGKILL)
    case.strike(f"kill -9 of the group {moment}")
    case.end(command, anything=True)


def kill_twice(case: Case) -> None:
    """kill -9 of the group, and again of the command that resumes it."""
    kill_group(case)
    kill_group(case)


def signal_launcher(case: Case) -> None:
    """SIGINT, SIGTERM or SIGHUP, once or twice, to the launching process."""
    _signalled(case, lambda command, signum: command.send(signum))


def signal_group(case: Case) -> None:
    """The same to the whole group, as a terminal and SLURM send them."""
    _signalled(case, lambda command, signum: command.send_group(signum))


def signal_rank(case: Case) -> None:
    """SIGTERM, SIGINT or SIGHUP to one rank alone: all of them stop after the same step."""
    signum = case.draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    command, moment = _at(case, *RANKS_UP)
    ranks = command.ranks()
    if ranks:
        rank = case.draw.choice(sorted(ranks))
        command.send(signum, ranks[rank])
        case.strike(f"{signum.name} to rank {rank} of {len(ranks)} {moment}")
    else:
        case.strike(f"no rank lived {moment}")
    case.end(command)


def _at(case: Case, *names: str) -> tuple[Command, str]:
    """Starts the command and waits for a random moment; returns both."""
    moment = moments.draw(case, *names)
    command = case.start()
    return command, moments.reach(case, command, moment)


def _signalled(case: Case, send: object) -> None:
    signum = case.draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    twice, pause = case.draw.random() < 0.4, case.draw.uniform(0, 0.3)
    command, moment = _at(case)
    begun = (case.run / "log").exists()
    send(command, signum)  # type: ignore[operator]
    if twice:
        command.wait(pause)
        send(command, signum)  # type: ignore[operator]
    times = f"twice, {1000 * pause:.0f} ms apart," if twice else "once"
    case.strike(f"{signum.name} {times} {moment}")
    # before it has handlers, and by a second signal, a process ends as any other program
    code = case.end(command, anything=twice or not begun)
    allowed = {signal.SIGINT: {0, 130}}.get(signum, {0, 75, 143})
    natural = {-signum, 128 + signum}
    if code not in allowed | (natural if twice or not begun else set()):
        raise Failure("WRONG CODE", f"{code} after {case.struck}; said: {case.sentence()}")
