"""The training step beside TRL (padding_free) and LLaMA-Factory (neat_packing), on the same rows.

    make bench-peers [ARGS="--only lora --rounds 6"]
    python -m benchmarks.peers [--only lora …] [--rounds 6] [--peers trl …] [--against COMMIT] [--json FILE]

SmolLM2-135M-Instruct on the demo's five tasks, a packed row a step, token mean, AdamW. All lanes take turns: a
round is one step of each on the same row, which they compare with the file of rows. Time is CPU seconds of a
lane's process with one thread; memory is the peak of its steps above what it held before the first. A first
round warms up. Ratios are medians of the rounds' ratios. --against adds this project at another commit;
--peers with no name leaves them out. Needs `mft demo`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers import work
from benchmarks.peers.turns import Lane
from benchmarks.peers.work import SETTINGS, Setting

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv-peers"
NAMES = {"trl": "TRL", "llamafactory": "LLaMA-Factory"}
OWN, PEAK, BF16 = "mft", "products", "TRL, bf16 weights"
ROUNDING = 0.01
"""Relative difference of two lanes' first loss: bf16 keeps 8 bits of each product."""


@dataclass
class Measured:
    """What a lane has reported."""

    facts: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Of the rounds, without the one that warms up."""

    @property
    def seconds(self) -> list[float]:
        """CPU seconds of each step."""
        return [step["seconds"] for step in self.steps]

    @property
    def memory(self) -> float:
        """MiB."""
        return max(step["memory"] for step in self.steps)


def lanes(
    setting: Setting,
    rows: list[work.Row],
    model: Path,
    folder: Path,
    peers: list[str],
    roots: dict[str, Path],
) -> Iterator[Lane]:
    """Starts the lanes, one after the other. roots: sources of this project by lane."""
    overrides, mine = setting.overrides(len(rows)), Path(sys.executable)
    for number, (name, root) in enumerate(roots.items()):
        arguments = ["run", str(folder / f"run-{number}"), str(root), *overrides]
        yield Lane(name, mine, "own_lane", arguments, folder / f"own-{number}.log")
    work.write(rows, folder / "rows.jsonl")
    chosen = {NAMES[peer]: (peer, "bfloat16" if setting.rank else "float32") for peer in peers}
    if "trl" in peers and not setting.rank:
        chosen[BF16] = ("trl", "bfloat16")  # its default
    for number, (name, (peer, dtype)) in enumerate(chosen.items()):
        own = folder / f"peer-{number}"
        own.mkdir()
        spec = {"model": str(model), "rows": str(folder / "rows.jsonl"), "folder": str(own), "dtype": dtype}
        spec |= {name: getattr(setting, name) for name in ("seq_length", "rank", "checkpointing")}
        (own / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        python = ENVIRONMENTS / peer / "bin" / "python"
        yield Lane(name, python, "peer_lane", [peer, str(own / "spec.json")], folder / f"peer-{number}.log")
    yield Lane(PEAK, mine, "own_lane", ["products"], folder / "products.log")


def measure(setting: Setting, rounds: int, peers: list[str], roots: dict[str, Path]) -> dict[str, Any]:
    """Returns what is known of each lane of a setting, by name, and of the rows."""
    rows, model = work.rows(setting.overrides(rounds + 1), rounds + 1)
    found: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        started = []
        for lane in lanes(setting, rows, model, Path(name), peers, roots):
            stack.callback(lane.close)
            started.append(lane)
            found[lane.name] = Measured(lane.facts)
        for number, row in enumerate(rows):
            for lane in started:
                step = lane.step()
                if lane.name != PEAK:
                    require_equal(lane.name, number, row, step)
                if number == 0:
                    found[lane.name].facts["loss"] = step.get("loss")
                else:
                    found[lane.name].steps.append(step)
    require_alike({name: of.facts for name, of in found.items() if name != PEAK})
    peak = median(step["flops"] / step["seconds"] for step in found.pop(PEAK).steps)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    flops = [work.necessary_flops(row, config, setting.rank) for row in rows[1:]]
    tokens = [len(row.ids) for row in rows[1:]]
    own = found[OWN]
    table = {}
    for name, of in found.items():
        rates = paired(tokens, of.seconds)
        table[name] = {
            "tokens_per_second": median(rates),
            "lowest": min(rates),
            "highest": max(rates),
            "own_speed": median(paired(of.seconds, own.seconds)),
            "memory_mib": of.memory,
            "own_memory": own.memory / of.memory,
            "of_peak": median(paired(flops, of.seconds)) / peak,
            "first_loss": of.facts["loss"],
            "seconds": of.seconds,
            "memory_by_step": [step["memory"] for step in of.steps],
        }
    shares = [row.trained / len(row.ids) for row in rows[1:]]
    about = {"rounds": rounds, "tokens": tokens, "samples": [len(row.lengths) for row in rows[1:]]}
    about |= {"with_loss": sum(shares) / rounds, "peak_gflops": peak / 1e9, "setting": asdict(setting)}
    return about | {"lanes": table}


def paired(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Returns the ratio of each round."""
    return [a / b for a, b in zip(one, other, strict=True)]


def require_equal(name: str, number: int, row: work.Row, step: dict[str, Any]) -> None:
    """Raises ValueError where a lane has counted other tokens than the row has."""
    counted, expected = (step["tokens"], step["with_loss"]), (len(row.ids), row.trained)
    if counted != expected:
        raise ValueError(f"{name}, step {number + 1}: {counted} tokens, with loss, instead of {expected}")


def require_alike(facts: dict[str, dict[str, Any]]) -> None:
    """Raises ValueError where lanes train other weights than this project, or begin with another loss."""
    own = facts[OWN]
    for name, of in facts.items():
        if of["trained"] != own["trained"]:
            raise ValueError(f"{name} trains {of['trained']:,} weights, {OWN} {own['trained']:,}")
        if name != BF16 and of.get("dtypes", ["float32"]) != ["float32"]:
            raise ValueError(f"{name} trains weights in {', '.join(of['dtypes'])}, {OWN} in float32")
        if abs(of["loss"] / own["loss"] - 1) > ROUNDING:
            raise ValueError(f"{name} begins with a loss of {of['loss']:.4f}, {OWN} {own['loss']:.4f}")


def goal(value: float, aim: float | None, sign: str) -> str:
    """Returns a number, and what is aimed at in brackets."""
    return f"{value:.2f}" if aim is None else f"{value:.2f} ({sign} {aim:.2f})"


def show(found: dict[str, Any], setting: Setting) -> None:
    """Prints a setting's table, 80 columns wide."""
    tokens, samples = sum(found["tokens"]) / found["rounds"], sum(found["samples"]) / found["rounds"]
    print(f"\n{setting.title}: {found['rounds']} rounds after one that warms up")
    print(
        f"a step: {tokens:,.0f} tokens in {samples:.1f} samples, {found['with_loss']:.0%} with loss; "
        f"peak {found['peak_gflops']:.0f} GFLOP per CPU second"
    )
    line = "{:<17} {:>17} {:>14} {:>6} {:>14} {:>7}"
    print(line.format("", "tokens per CPU s", "mft's speed", "step", "mft's memory", "part of"))
    print(line.format("", "(low to high)", "(goal)", "MiB", "(goal)", "peak"))
    for name, of in found["lanes"].items():
        rate = f"{of['tokens_per_second']:.1f} ({of['lowest']:.0f}-{of['highest']:.0f})"
        speed = "" if name == OWN else goal(of["own_speed"], setting.speed.get(name), ">=")
        memory = "" if name == OWN else goal(of["own_memory"], setting.memory.get(name), "<=")
        print(line.format(name, rate, speed, f"{of['memory_mib']:,.0f}", memory, f"{of['of_peak']:.2f}"))
    if setting.peak:
        print(f"goal of {OWN}: {setting.peak:.2f} of the peak")


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Returns a work tree of a commit for as long as it is needed."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(path), commit], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def main() -> None:
    """Measures the settings that are asked for and prints a table of each as soon as it is known."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--peers", nargs="*", choices=NAMES, default=list(NAMES))
    parser.add_argument("--against", metavar="COMMIT")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    for peer in given.peers:
        if not (ENVIRONMENTS / peer / "bin" / "python").exists():
            parser.error(f"{ENVIRONMENTS / peer} is missing: make bench-peers makes it")
    known = ["git", "-C", str(ROOT), "rev-parse", "--quiet", "--verify", f"{given.against}^{{commit}}"]
    if given.against and subprocess.run(known, stdout=subprocess.DEVNULL).returncode:
        parser.error(f"--against {given.against}: git knows no such commit here")
    results = {}
    with ExitStack() as stack:
        roots = {OWN: ROOT}
        if given.against:
            roots[f"{OWN} {given.against[:12]}"] = stack.enter_context(checkout(given.against))
        for name in given.only:
            results[name] = measure(SETTINGS[name], given.rounds, given.peers, roots)
            show(results[name], SETTINGS[name])
            if given.json:
                given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
