"""The tables of mistakes: wrong command lines in two text files, and wrong files here.

A line of the text files is a command line as a shell reads it, then the words that its sentence must hold,
each behind a bar. `$NAME=value` in front sets a variable of the environment. Lines of mistakes_train.txt are
added to `mft train` and BASE, those of mistakes_verbs.txt are whole commands.
"""

from __future__ import annotations

import shlex
from pathlib import Path

BASE = (
    *("model=tiny", "data.paths=[alpha,beta]", "data.seq_length=128", "data.split=[80,20,0]"),
    *("train.precision=fp32", "train.max_steps=2", "tracking=none", "launch=inline"),
)
"""A tiny run that works, in a folder with the two tasks."""


def rows(file: str) -> list[tuple[str, list[str]]]:
    """Returns (command line, words of its sentence) of a text file of this folder."""
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    split = [line.split(" | ") for line in lines if line.strip() and not line.startswith("#")]
    return [(line.strip(), [part.strip() for part in parts]) for line, *parts in split]


def words(line: str) -> tuple[dict[str, str], list[str]]:
    """Returns the variables of the environment and the arguments of a command line."""
    split = shlex.split(line.replace(r"\u200b", "\u200b"))
    variables = [word for word in split if word.startswith("$")]
    pairs = (word[1:].partition("=") for word in variables)
    return {name: value for name, _, value in pairs}, [word for word in split if word not in variables]


GLOBAL = "# @package _global_\n"
TASK = "# @package task.mine\n_target_: mft.data.task.Task\npaths: [alpha]\n"
ROW = '{"prompt": "a", "answer": "b"}\n'

EXPERIMENTS: list[tuple[str, str | bytes, list[str]]] = [
    ("scalar", "just text\n", ["cd/experiment/scalar.yaml:1: contains no keys but one value"]),
    ("number", "42\n", ["cd/experiment/number.yaml:1: contains no keys but one value"]),
    ("list", GLOBAL + "- train\n- model\n", ["cd/experiment/list.yaml:2: contains no keys but a list"]),
    ("empty", "", ["experiment/empty.yaml: its first line must be `# @package _global_`."]),
    ("binary", bytes(range(256)), ["cd/experiment/binary.yaml:2: is not UTF-8 (byte 0x80)"]),
    ("png", b"\x89PNG\r\n\x1a\n\0\0", ["cd/experiment/png.yaml:1: is not UTF-8 (byte 0x89)"]),
    ("latin", GLOBAL.encode() + b"name: caf\xe9\n", ["latin.yaml:2: is not UTF-8 (byte 0xe9)", "UTF-8."]),
    ("utf16", f"{GLOBAL}name: x\n".encode("utf-16"), ["utf16.yaml:1: is not UTF-8 (byte 0xff)"]),
    (
        "typo",
        GLOBAL + "train: {max_stesp: 3}\n",
        ["experiment/typo.yaml: train.max_stesp", "mean max_steps?"],
    ),
    ("group", GLOBAL + "optimiser: {lr: 1e-3}\n", ["experiment/group.yaml: optimiser", "mean optimizer?"]),
    ("field", GLOBAL + "peft: {rnak: 4}\n", ["peft.rnak: Lora has no such field", "did you mean rank?"]),
    ("type", GLOBAL + "train: {max_steps: ten}\n", ["type.yaml: train.max_steps: must be an integer."]),
    ("text", GLOBAL + "data: {paths: alpha}\n", ["text.yaml: data.paths: must be a list, such as [a,b]."]),
    ("many", GLOBAL + "peft: {rank: [4]}\n", ["peft.rank=[4]: must be an integer."]),
    ("default", GLOBAL + "defaults: [override /peft: loar]\n", ["peft=loar: unknown", "did you mean lora?"]),
    ("second", GLOBAL + "defaults: [/peft: lora]\n", ["peft: a yaml chooses", "[override /peft: NAME]"]),
    ("defaults", GLOBAL + "defaults: lora\n", ["cd/experiment/defaults.yaml: defaults: expected a list"]),
    ("nowhere", GLOBAL + "defaults: [nothere]\n", ["experiment=nothere: unknown option", "Allowed: "]),
    ("pfet", GLOBAL + "defaults: [override /pfet: lora]\n", ["no key 'pfet'; did you mean peft?"]),
    (
        "cycle",
        GLOBAL + "defaults: [cycle]\n",
        ["cd/experiment/cycle.yaml: its defaults lead back to itself."],
    ),
    ("void", GLOBAL + "train: null\n", ["experiment/void.yaml: train: must not be null."]),
    ("nothing", GLOBAL + "model:\n", ["model has no _target_, the class to build; got null", "model=NAME"]),
    (
        "anchor",
        GLOBAL + "name: *nothere\n",
        ["anchor.yaml:2: not valid YAML: found undefined alias 'nothere'"],
    ),
    ("self", GLOBAL + "name: &a [*a]\n", ["self.yaml:2: *a stands inside the value it refers to."]),
    ("intkey", GLOBAL + "5: 3\n", ["experiment/intkey.yaml: 5: the config has no key '5'. Allowed: name"]),
    ("inner", GLOBAL + "train: {5: 3}\n", ["experiment/inner.yaml: train.5: train has no key '5'"]),
    ("notarget", GLOBAL + "peft: lora\n", ["peft has no _target_", "got 'lora'", "[override /peft: NAME]"]),
    ("nulltarget", GLOBAL + "loss: {_target_: null}\n", ["loss has no _target_, the class to build"]),
    ("target", GLOBAL + "loss: {_target_: os.system}\n", ["loss._target_=os.system: os is not a package"]),
    ("bigint", GLOBAL + f"train: {{seed: {'9' * 5000}}}\n", ["bigint.yaml:2: a number of 5,000 characters"]),
    (
        "large",
        GLOBAL + f"train: {{seed: {'9' * 20}}}\n",
        [f"train.seed={'9' * 20} must be at least 0 and at"],
    ),
    ("deep", GLOBAL + f"choices: {'[' * 200 + ']' * 200}\n", ["deep.yaml:2: more than 64 levels of nested"]),
    ("deeper", GLOBAL + f"choices: {'{a: ' * 99}1{'}' * 99}\n", ["deeper.yaml:2: more than 64 levels"]),
    ("tag", GLOBAL + "name: !!python/name:os.system ''\n", ["tag.yaml:2: the tag tag:yaml.org,2002:python"]),
    (
        "tab",
        GLOBAL + "train:\n\tmax_steps: 3\n",
        ["cd/experiment/tab.yaml:3: not valid YAML: found character"],
    ),
    ("open", GLOBAL + "train: {max_steps: 3\n", ["cd/experiment/open.yaml:3: not valid YAML: did not find"]),
    ("twice", GLOBAL + "name: a\nname: b\n", ["cd/experiment/twice.yaml:3: not valid YAML: found duplicate"]),
    ("package", "train: {max_steps: 3}\n", ["experiment/package.yaml: its first line must be `# @package"]),
    (
        "secret",
        GLOBAL + "launch: {rdzv_endpoint: 'u:pw1234@h:1'}\n",
        ["launch.rdzv_endpoint: the address holds"],
    ),
    (
        "callback",
        GLOBAL + "hydra: {callbacks: {x: {_target_: subprocess.Popen}}}\n",
        ["hydra.callbacks.x._target_"],
    ),
    ("plugin", GLOBAL + "plugin: [os]\n", ["experiment/plugin.yaml: plugin: the config has no key 'plugin'"]),
]
"""Option of `experiment` → its yaml, and words of the sentence."""

TASKS: list[tuple[str, str, list[str]]] = [
    ("notanumber", f"{TASK}weight: .nan\n", ["task.mine.weight=nan must be at least 0 and finite."]),
    ("share", f"{TASK}share: -2\n", ["task.mine.share=-2 must be at least 0, or null."]),
    ("mixture", f"{TASK}share: 2\n", ["task.mine.share=2 does nothing with data.mixture=natural"]),
    ("zero", f"{TASK}weight: -1\n", ["task.mine.weight=-1 must be at least 0."]),
    (
        "format",
        TASK.replace("_t", "defaults: [/format@format: chta]\n_t"),
        ["format=chta", "did you mean chat?"],
    ),
    ("formatname", f"{TASK}format: chta\n", ["task.mine.format='chta': unknown", "did you mean chat?"]),
    ("fmtstr", f"{TASK}format: 5\n", ["task.mine.format=5: unknown format. Allowed: auto, chat"]),
    ("name", f'{TASK}name: "a\\nb"\n', ["must be at most 200 printable characters"]),
    ("same", f"{TASK}name: alpha\n", ["would be a second task named 'alpha', beside task.alpha"]),
    ("fn", TASK.replace("task.Task", "task.all_tasks"), ["task.mine._target_", "is a function; expected"]),
    ("cls", TASK.replace("task.Task", "task.Tsk"), ["mft.data.task has no Tsk; did you mean Task?"]),
    ("paths", TASK.replace("[alpha]", "alpha"), ["task.mine.paths='alpha': must be a list, such as [a,b]."]),
    ("there", TASK.replace("alpha", "alhpa"), ["task.mine.paths: alhpa does not exist; did you mean alpha?"]),
    ("five", TASK.replace("alpha", "5"), ["task.mine.paths: 5 must be a path, in quotes"]),
    ("none", TASK.replace("alpha", ""), ["task.mine.paths: is empty; allowed: folders with *.jsonl"]),
    ("valid", f"{TASK}valid: [nowhere]\n", ["task.mine.valid: nowhere does not exist"]),
    ("wieght", f"{TASK}wieght: 2\n", ["task.mine.wieght: Task has no such field; did you mean weight?"]),
    ("target", "# @package task.mine\npaths: [alpha]\n", ["task.mine has no _target_", "mft.data.task.Task"]),
]
"""Option of `task` → its yaml, and words of the sentence."""

DATA: list[tuple[str, str | bytes, list[str]]] = [
    (
        "half",
        ROW + '{"prompt": "a", "answ',
        ["half/rows.jsonl:2: is not JSON: Unterminated", "data.bad_rows=skip"],
    ),
    ("array", '["a", "b"]\n', ["array/rows.jsonl:1: must be an object with named fields, got 'a'"]),
    ("fields", '{"foo": "a", "bar": "b"}\n', ["task.fields: no format fits", "'foo, bar'", "prompt/answer"]),
    ("number", f"{ROW}5\n", ["number/rows.jsonl:2: must be an object with the field prompt, got 5"]),
    ("null", f"{ROW}null\n", ["null/rows.jsonl:2: must be an object with the field prompt, got null"]),
    ("text", "hello\n", ["text/rows.jsonl:1: is not JSON: Expecting value at character 0, near 'hello'"]),
    (
        "missing",
        f'{ROW}{{"prompt": "a"}}\n',
        ["missing/rows.jsonl:2: answer: is missing", "fields: 'prompt'"],
    ),
    ("type", f'{ROW}{{"prompt": "a", "answer": 5}}\n', ["type/rows.jsonl:2: answer: must be text, got 5"]),
    ("empty", "", ["data.paths: data/empty/rows.jsonl has no rows."]),
    ("blank", "\n\n", ["data.paths: data/blank/rows.jsonl has no rows."]),
    (
        "latin",
        ROW.replace("a", "\xe9").encode("latin-1"),
        ["latin/rows.jsonl:1: is not UTF-8: byte b'\\xe9'"],
    ),
    ("utf16", ROW.encode("utf-16"), ["utf16/rows.jsonl: is UTF-16 text; convert it: iconv -f UTF-16"]),
    ("gzip", b"\x1f\x8b\x08\0abc", ["gzip/rows.jsonl: is gzip data; name it *.jsonl.gz."]),
    ("png", b"\x89PNG\r\n\x1a\n\0\0", ["png/rows.jsonl: is binary data"]),
    (
        "role",
        '{"chat_rounds": [{"role": "humna", "content": "a"}]}\n',
        ["chat_rounds[0].role", "mean human?"],
    ),
    ("order", '{"chat_rounds": [{"role": "bot", "content": "a"}]}\n', ["'bot' is not allowed here; allowed"]),
    ("content", '{"messages": [{"role": "user", "content": null}]}\n', ["messages[0].content: must be text"]),
    (
        "twice",
        '{"prompt": "a", "prompt": "b", "answer": "c"}\n',
        ["twice/rows.jsonl:1", "'prompt' comes twice"],
    ),
    ("indent", '{\n  "prompt": "a"\n}\n', ["indent/rows.jsonl:1: is not JSON", "jq -c . rows.jsonl"]),
    ("deep", f"{ROW}{'[' * 9000}{']' * 9000}\n", ["deep/rows.jsonl:2: is not usable", "nested too deeply"]),
    ("escape", '{"prompt": "\x1b]52;c;e\x07"\n', ["escape/rows.jsonl:1: is not JSON", "\\x1b]52;c;e\\x07"]),
]
"""Folder of data.paths → its rows, and words of the sentence."""

PROMPTS: list[tuple[str, str, list[str]]] = [
    ("text", "hello\n", ["train.prompts: text.jsonl:1: is not JSON"]),
    ("empty", "", ["train.prompts=empty.jsonl holds no prompts."]),
    ("row", ROW, ["train.prompts: row.jsonl:1: chat_rounds: is missing; the row's fields: 'prompt, answer'"]),
    ("role", '{"chat_rounds": [{"role": "robot", "content": "a"}]}\n', ["'robot' is none of system, user"]),
]
"""File of train.prompts → its content, and words of the sentence."""

FILES = [
    *(
        (f"cd/experiment/{n}.yaml", x, ["--config-dir", "cd", f"experiment={n}"], p)
        for n, x, p in EXPERIMENTS
    ),
    *((f"cd/task/{n}.yaml", x, ["--config-dir", "cd", f"task={n}"], p) for n, x, p in TASKS),
    *((f"data/{n}/rows.jsonl", x, [f"data.paths=[data/{n}]"], p) for n, x, p in DATA),
    *((f"{n}.jsonl", x, [f"train.prompts={n}.jsonl"], p) for n, x, p in PROMPTS),
]
"""(file, content, arguments that name it, words of the sentence)"""
