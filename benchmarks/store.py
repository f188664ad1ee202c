"""The token cache: tokenising against a per-piece Python encoder, the second start, memory, random access.

python -m benchmarks.store             everything (about ten minutes on two idle cores; needs `mft demo`)
python -m benchmarks.store speed       tokens per CPU second and per second, both encoders alternating on the same rows
python -m benchmarks.store start       200,000 cached samples in five tasks: time until the first micro-batches
python -m benchmarks.store memory      resident memory while 2,000,000 short samples are tokenised, and access to them
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LENGTH = 1024
ROUNDS, COPIES = 3, 6  # of the demo's rows: 6 million tokens a round and encoder
MIXTURE_TASKS, MIXTURE_SAMPLES = 5, 200_000
SHORT_SAMPLES = 2_000_000


def demo() -> Path:
    """Returns the demo's folder; its tokenizer and rows are the input."""
    from mft.config.schema import default_cache_dir
    from mft.demo import make

    return make(Path(default_cache_dir()), print)


def resident() -> float:
    """Returns the resident size of this process, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def per_piece(file: Path, tokenizer: Any, padded: bool) -> int:
    """Tokenises a file as MFTCoder 0.5 does, piece by piece in Python; returns the number of tokens kept.

    Like its UniformEncoder: one `encode` for the system text, for each question, each answer and each line
    break after it, lists of ids and of the loss mask that grow turn by turn, long samples dropped. padded:
    every list is filled up to the sequence length, and all of a file become two float32 arrays at its end, as
    there; without, each sample becomes two int32 arrays at once, a leaner encoder of the same kind.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    kept: list[tuple[Any, Any]] = []
    tokens = 0
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            ids: list[int] = []
            mask: list[int] = []
            for turn in json.loads(line)["chat_rounds"]:
                content = turn["content"].replace("\u202f", " ").replace("\xa0", " ") + "\n"
                if turn["role"] == "bot":
                    answer, end = [*encode(content), tokenizer.eos_token_id], encode("\n")
                    ids += answer + end
                    mask += [1] * len(answer) + [0] * len(end)
                else:
                    system = turn["role"] == "system"
                    prompt = encode(f"<s>system\n{content}" if system else f"<s>human\n{content}<s>bot\n")
                    ids += prompt
                    mask += [0] * len(prompt)
            if len(ids) > SEQ_LENGTH:
                continue
            tokens += len(ids)
            if padded:
                ids += [tokenizer.pad_token_id] * (SEQ_LENGTH - len(ids))
                mask += [0] * (SEQ_LENGTH - len(mask))
                kept.append((ids, mask))
            else:
                kept.append((np.array(ids, np.int32), np.array(mask, np.int32)))
    if padded:
        for column in zip(*kept, strict=True):
            np.array(column, np.float32)
    return tokens


def speed(folder: Path) -> None:
    """Prints the rates and their ratios, medians of rounds in turns; all make the ids of the template
    `mftcoder`."""
    from transformers import AutoTokenizer

    from mft.data.cache.store import prepare
    from mft.data.settings import DataSettings
    from mft.data.task import Task
    from mft.data.template import MftCoder
    from mft.data.tokenize import Encoder

    file = folder / "rows.jsonl"
    rows = "".join(path.read_text(encoding="utf-8") for path in sorted((demo() / "tasks").rglob("*.jsonl")))
    file.write_text(rows * COPIES, encoding="utf-8")
    settings = DataSettings(seq_length=SEQ_LENGTH)
    theirs, ours = (
        AutoTokenizer.from_pretrained(demo() / "model") for _ in range(2)
    )  # each has a cache of words

    def store(number: int) -> int:
        task = Task("rows", [str(file)])
        return prepare(task, Encoder(ours, MftCoder()), settings, folder / f"cache{number}").report["tokens"]

    rates: dict[str, list[tuple[float, float]]] = {"per piece, padded": [], "per piece": [], "store": []}
    for number in range(ROUNDS):
        runs = (
            lambda: per_piece(file, theirs, True),
            lambda: per_piece(file, theirs, False),
            lambda n=number: store(n),
        )
        counts = []
        for name, run in zip(rates, runs, strict=True):
            cpu, wall = time.process_time(), time.perf_counter()
            counts.append(run())
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            rates[name].append((counts[-1] / cpu / 1e6, counts[-1] / wall / 1e6))
        assert len(set(counts)) == 1, f"all must make the same tokens: {counts}"
    print(
        f"{counts[0]:,} tokens, {ROUNDS} rounds in turns, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}"
    )
    for name, found in rates.items():
        cpu, wall = (statistics.median(part) for part in zip(*found, strict=True))
        print(f"{name:<18} {cpu:.3f} million tokens a CPU second, {wall:.3f} a second")
    for name in list(rates)[:2]:
        pairs = zip(rates["store"], rates[name], strict=True)  # of the same round: the machine's speed drifts
        ratios = [[mine / other for mine, other in zip(*pair, strict=True)] for pair in pairs]
        cpu, wall = (statistics.median(part) for part in zip(*ratios, strict=True))
        print(f"store / {name}: {cpu:.2f} x a CPU second, {wall:.2f} x a second")


def words() -> Iterator[str]:
    """Yields short questions and answers without end, none twice."""
    random = np.random.default_rng(0)
    vocabulary = np.array(
        ["list", "of", "the", "returns", "number", "file", "def", "a", "for", "value", "not", "key"]
    )
    for number in itertools.count():
        yield f"{number} {' '.join(random.choice(vocabulary, 6))}"


def write_rows(file: Path, count: int, text: Iterator[str]) -> None:
    """Writes rows of about 20 tokens."""
    with file.open("w", encoding="utf-8") as out:
        for question in itertools.islice(text, count):
            turns = [{"role": "human", "content": question}, {"role": "bot", "content": question[-12:]}]
            out.write(json.dumps({"chat_rounds": turns}) + "\n")


def start(folder: Path) -> None:
    """Prints what the second start of a mixture takes, in a process of its own."""
    text = words()
    paths = []
    for number in range(MIXTURE_TASKS):
        paths.append(folder / f"task{number}.jsonl")
        write_rows(paths[-1], MIXTURE_SAMPLES // MIXTURE_TASKS, text)
    overrides = [f"model.path={demo() / 'model'}", f"data.paths=[{','.join(map(str, paths))}]", "data=pack"]
    overrides += [f"cache_dir={folder / 'cache'}", "train.epochs=3"]
    time.sleep(2.5)  # so that the fingerprints of these files are remembered
    for what in ("first", "second", "third"):
        print(f"{what} start:", child("child_start", *overrides))


def child_start(overrides: list[str]) -> None:
    """Starts the data of a run, and prints seconds and MiB beyond the imports."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from omegaconf import OmegaConf

    from mft.config.build import build
    from mft.config.compose import compose_resolved
    from mft.config.schema import batch_sizes
    from mft.data.datasets import dataset
    from mft.data.loader import BatchLoader
    from mft.model.causal_lm import CausalLM

    cfg = compose_resolved(overrides)
    CausalLM(str(cfg.model.path)).tokenizer()  # imports what transformers imports lazily
    before, clock, cpu = resident(), time.perf_counter(), time.process_time()

    def make(path: str) -> Any:
        return build(OmegaConf.select(cfg, path), path)

    data: Any = OmegaConf.to_object(cfg.data)
    tasks = {str(name): make(f"task.{name}") for name in cfg.task}
    known = dataset(tasks, data, make("model").tokenizer(), cfg.cache_dir)
    shares = [task.share for task in known.tasks]
    sizes = batch_sizes(cfg.train, 1)
    pad = known.tokenizer.pad_token_id
    feed = BatchLoader(known.stores, make("data.rows"), sizes, 0, pad, cfg.train, data, shares)
    steps = feed.total_steps()
    next(feed.steps(0, 0))
    seconds, busy = time.perf_counter() - clock, time.process_time() - cpu
    samples = len(feed.train_samples) + len(feed.valid_samples)
    print(
        f"{samples:,} samples, {steps:,} steps: first micro-batches {seconds:.2f} s ({busy:.2f} CPU s) "
        f"and {resident() - before:.0f} MiB after the imports"
    )


def memory(folder: Path) -> None:
    """Prints the resident size of a process that tokenises very many short samples, and the time of random
    access."""
    write_rows(folder / "short.jsonl", SHORT_SAMPLES, words())
    print(child("child_memory", str(folder / "short.jsonl"), str(folder / "cache")))


def child_memory(arguments: list[str]) -> None:
    """Tokenises a file while a thread looks at the memory, then reads samples at random."""
    from transformers import AutoTokenizer

    from mft.data.cache.store import prepare
    from mft.data.settings import DataSettings
    from mft.data.task import Task
    from mft.data.template import Template
    from mft.data.tokenize import Encoder

    tokenizer = AutoTokenizer.from_pretrained(demo() / "model")
    task, cache = Task("short", [arguments[0]]), Path(arguments[1])
    seen: list[tuple[float, float]] = []
    done = threading.Event()

    def watch() -> None:
        begun = time.monotonic()
        while not done.wait(1.0):
            seen.append((time.monotonic() - begun, resident()))

    before = resident()
    threading.Thread(target=watch, daemon=True).start()
    clock, cpu = time.perf_counter(), time.process_time()
    store = prepare(task, Encoder(tokenizer, Template()), DataSettings(), cache)
    seconds, busy = time.perf_counter() - clock, time.process_time() - cpu
    done.set()
    points = [
        seen[min(len(seen) - 1, round(part * len(seen)))] for part in (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    ]
    print(f"{len(store):,} samples, {store.report['tokens']:,} tokens in {seconds:.0f} s ({busy:.0f} CPU s)")
    print(
        f"MiB above the {before:.0f} before: "
        + ", ".join(f"{mib - before:.0f} at {s:.0f} s" for s, mib in points)
    )
    random = np.random.default_rng(0)
    for count in (len(store) // 1000, len(store)):
        numbers = random.integers(0, count, 20_000)
        clock = time.process_time()
        for number in numbers:
            store.sample(int(number))
        each = (time.process_time() - clock) / len(numbers) * 1e6
        print(f"random access among the first {count:,} samples: {each:.1f} µs a sample")


def child(name: str, *arguments: str) -> str:
    """Returns what a function of this module prints in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.store", name, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    chosen = sys.argv[1:] or ["speed", "start", "memory"]
    if chosen[0] in ("child_start", "child_memory"):
        globals()[chosen[0]](chosen[1:])
        return
    parts = {"speed": speed, "start": start, "memory": memory}
    unknown = [name for name in chosen if name not in parts]
    if unknown:
        raise SystemExit(f"there is no part {unknown[0]}; allowed: {', '.join(parts)}")
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder))


if __name__ == "__main__":
    main()
