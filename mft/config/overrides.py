"""The overrides of a command line, judged before Hydra composes anything: what can be read, what replaces
what."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mft.config.inputs import under
from mft.config.other_trainers import here
from mft.config.places import check_name
from mft.config.schema import config_dir
from mft.console import credentials
from mft.errors import UserError, nearest, shortened

SEVERAL = ("task", "tracking")
"""Groups of which several options can be chosen."""

KEPT = (
    *(
        "data",
        "model",
        "peft",
        "dist",
        "loss",
        "optimizer",
        "scheduler",
        "train",
        "launch",
        "hydra",
        "schema",
    ),
    *("name", "sweep", "choices", "output_dir", "cache_dir"),
)
"""What no run can do without."""

DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
"""What word processors and web pages make of a hyphen."""

HONOURED = ("hydra.run.dir", "hydra.searchpath")
"""Hydra's settings that have an effect on one run."""

HONOURED_IN_SWEEPS = (
    *("hydra.sweep.dir", "hydra.searchpath", "hydra.mode", "hydra.verbose"),
    *("hydra.sweeper", "hydra/sweeper", "hydra.launcher", "hydra/launcher"),
    *("hydra.callbacks", "hydra/callbacks", "hydra.hydra_logging", "hydra/hydra_logging"),
)
"""The same for a sweep on this machine; launchers of other packages read further ones."""

HYDRA_VALUES = ("hydra.verbose", "hydra.mode", "hydra.searchpath", "hydra.output_subdir")
"""Keys right below `hydra` that hold a value; the others are mappings, without which Hydra does not start."""

HYDRA_INSTEAD = {
    "hydra.sweep.dir": "it is for sweeps (-m); output_dir=… is the folder of one run",
    "hydra.run.dir": "a sweep's jobs have folders of their own; hydra.sweep.dir=… is the sweep's folder",
    "hydra.job.chdir": "runs stay in the folder they were started in",
    "hydra.mode": "-m starts a sweep",
}
"""Why some of Hydra's settings have no effect."""

MOVED_KEYS = {
    "train.fail_fast": "launch.fail_fast",
    "train.prune": "launch.prune",
    "train.prune_after": "launch.prune_after",
}
"""Keys of earlier versions → where they are now; the old ones are refused with the new name."""

DEEPEST = 64
"""Brackets that a value on the command line may have."""


def key_of(override: str) -> str:
    """Returns what an override sets."""
    return override.split("=", 1)[0].lstrip("+~")


def with_moved_keys(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides of a recorded command with keys of earlier versions under their present names."""
    return [
        o.replace(key, MOVED_KEYS.get(key, key), 1)
        for o, key in zip(overrides, map(key_of, overrides), strict=True)
    ]


def group_options(group: str, folders: Sequence[Path] = ()) -> list[str]:
    """Returns the options of a config group in conf/ and `folders`, without the yamls of conf/ that options
    share."""
    names = {path.stem for folder in (config_dir(), *folders) for path in (folder / group).glob("*.yaml")}
    return sorted(name for name in names if not is_base(group, name))


def is_base(group: str, name: str) -> bool:
    """Whether a yaml of conf/ holds what options of its group share (data/base, model/_base), and is none
    itself."""
    return (name == "base" or name.startswith("_")) and (config_dir() / group / f"{name}.yaml").is_file()


def credentials_in(key: str) -> str:
    """Returns the refusal of a password or key, which it does not repeat."""
    return (
        f"{key}: the address holds a user, a password or a key, and configs are kept with the run; write "
        f"it as "
        "${oc.env:NAME}, which is kept as written and read in every rank, or, for MLflow, give it as "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment."
    )


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises UserError for overrides that Hydra cannot read or answers with a traceback, and for what they
    must not do.

    These are: unreadable text, characters that cannot be seen, groups that are removed or given a number,
    null or several options, and Hydra's own nodes replaced as a whole.
    """
    for override in overrides:
        _check_characters(override)
        if max(map(override.count, "[{(")) > DEEPEST:
            raise UserError(
                f"{shortened(key_of(override))}: its value has too many brackets; expected at most {DEEPEST}."
            )
        if credentials.written_out(override.partition("=")[2], key_of(override)):
            raise UserError(credentials_in(key_of(override)))
        parsed = _parsed(override)
        _check_hydra(override)
        if parsed.key_or_group == "name" and isinstance(name := parsed.value(), str) and "${" not in name:
            check_name(name)  # before a sweep makes a folder of it
        if parsed.is_delete():
            _check_deletion(override, parsed)
        elif (
            (config_dir() / parsed.key_or_group).is_dir()
            and not parsed.package
            and not parsed.is_sweep_override()
        ):
            _check_choice(override, parsed)


def replaced(overrides: Sequence[str]) -> list[str]:
    """Returns a sentence for every key that is set more than once, of which the last value holds."""
    last: dict[str, list[str]] = {}
    for override in overrides:
        last.setdefault(key_of(override), []).append(override)
    return [
        f"{key} is set {len(found)} times; {found[-1]} is used."
        for key, found in last.items()
        if len(found) > 1
    ]


def of_hydra(overrides: Sequence[str], sweep: bool) -> list[str]:
    """Returns a sentence for every setting of Hydra's own that has no effect. sweep: whether these are a
    sweep's."""
    elsewhere = [o for o in overrides if key_of(o) == "hydra/launcher" and not o.endswith("=mft")]
    if sweep and elsewhere:
        return []
    honoured = HONOURED_IN_SWEEPS if sweep else HONOURED
    notes = []
    for override in overrides:
        key = key_of(override)
        if re.match(r"hydra[./]", key) and not under(
            key.replace("/", "."), [h.replace("/", ".") for h in honoured]
        ):
            fallback = f"mft {'runs sweeps' if sweep else 'composes runs'} without this part of Hydra"
            if not sweep and under(key.replace("/", "."), ("hydra.sweeper", "hydra.launcher", "hydra.sweep")):
                fallback = "it is for sweeps (-m)"
            notes.append(f"{override} has no effect: {HYDRA_INSTEAD.get(key, fallback)}.")
    return notes


def with_output_dir(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides of one run with `hydra.run.dir`, the habit of Hydra's users, as `output_dir`.

    Raises UserError where both are given.
    """
    keys = [key_of(o) for o in overrides]
    if {"hydra.run.dir", "output_dir"} <= set(keys):
        raise UserError("hydra.run.dir and output_dir both name the run folder; keep output_dir.")
    return [
        f"output_dir={o.partition('=')[2]}" if key == "hydra.run.dir" and "=" in o else o
        for o, key in zip(overrides, keys, strict=True)
    ]


def not_an_override(word: str) -> str:
    """Returns the sentence for a word without `=`: with what was probably meant, as far as it can be
    guessed."""
    if word[:1] in DASHES:
        dash = unicodedata.name(word[0]).lower()
        return f"{word!r} starts with {dash}, not with a hyphen; write --{word.lstrip(DASHES)}."
    groups = sorted(path.name for path in config_dir().iterdir() if path.is_dir())
    options = [f"{group}={word}" for group in groups if word in group_options(group)]
    if options:
        meant = options[0]
    elif Path(word).suffix in (".yaml", ".yml"):
        meant = f"--config-dir DIR experiment={Path(word).stem}"
    elif "/" in word or Path(word).exists():
        meant = f"data.paths=[{word}]"
    else:
        known = here(word).removeprefix("; did you mean ").removesuffix("?")
        meant = f"{known or word}=…" if known or word in groups or "." in word else ""
    hint = (
        f"did you mean {meant}?"
        if meant
        else "use key=value (a group: peft=lora, a value: optimizer.lr=2e-4)."
    )
    return f"{word!r} is not a valid override; {hint}"


def unknown_flag(flag: str, flags: Sequence[str], command: str) -> str:
    """Returns the sentence for a flag that a command with overrides does not have; it may be meant as an
    override."""
    name, equals, value = flag.lstrip("-").partition("=")
    hint = nearest(flag.partition("=")[0], flags)
    if not hint and (equals or "." in name or here(name)):
        plain = here(name).removeprefix("; did you mean ").removesuffix("?") or name
        written = plain if "=" in plain else f"{plain}={value or '…'}"
        hint = f"; did you mean {written}, without dashes?"
    return f"{command} has no flag {shortened(flag)[1:-1]}{hint or '.'} Flags: {', '.join(flags)}."


def _check_characters(override: str) -> None:
    key, equals, value = override.partition("=")
    bare = key.lstrip("+~")
    for place, text in (("key", key), ("value", value)):
        for letter in text:
            category = unicodedata.category(letter)
            # the two join letters and emoji
            hidden = category in ("Cf", "Cc") and letter not in "\t\n\u200c\u200d"
            if hidden or (place == "key" and (letter.isspace() or category[0] == "Z")):
                name = unicodedata.name(letter, "control character").lower()
                raise UserError(
                    f"{shortened(override)}: its {place} contains {name} (U+{ord(letter):04X}); type it "
                    f"again without."
                )
    if equals and (not bare or bare.startswith("@")):
        raise UserError(
            f"{override}: the key before = is missing; use key=value, for example optimizer.lr=2e-4."
        )
    if not override.isprintable() and "\n" not in override and "\t" not in override:
        raise UserError(f"{shortened(override)}: contains bytes that are not text in UTF-8.")


def _parsed(override: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(override)
    except RecursionError:
        raise UserError(f"{shortened(override)}: brackets are nested too deeply.") from None
    except HydraException as error:
        key = override.partition("=")[0]
        if not re.fullmatch(r"(\+{1,2}|~)?[\w$][\w$./@:-]*", key):
            raise UserError(
                f"{shortened(override)}: {key!r} is not a key; keys are names joined by dots, such as "
                f"train.max_steps."
            ) from error
        reason = str(error).splitlines()[0].strip()
        raise UserError(
            f"{shortened(override, 300)[1:-1]}: cannot be read ({shortened(reason, 120)[1:-1]}). Close "
            "brackets and quotes, and put text that holds brackets, commas, ~ or = in quotes of its own: "
            '\'data.paths=["~/a,b","c=d"]\'.'
        ) from error


def _check_hydra(override: str) -> None:
    key = key_of(override)
    node = key == "hydra" or (key.startswith("hydra.") and key.count(".") == 1 and key not in HYDRA_VALUES)
    if node or under(key, ("hydra.runtime", "hydra.overrides")):
        raise UserError(
            f"{override}: {key} belongs to Hydra and cannot be replaced; the folder of a run is "
            "output_dir=…, that of a sweep hydra.sweep.dir=…"
        )


def _check_deletion(override: str, parsed: Any) -> None:
    key = parsed.key_or_group
    if key in KEPT:
        raise UserError(
            f"{override}: {key} cannot be removed, since every run needs it; set another value, {key}=…"
        )


def _check_choice(override: str, parsed: Any) -> None:
    group, value = parsed.key_or_group, parsed.value()
    several = isinstance(value, list) and group not in SEVERAL
    words = value if isinstance(value, list) else [value]
    outside = any(isinstance(word, str) and (word.startswith("/") or ".." in word) for word in words)
    nothing = any(word is None or word == "" or isinstance(word, int | float) for word in words)
    none_of_several = group == "tracking" and "none" in words and len(words) > 1
    shared = any(isinstance(word, str) and is_base(group, word) for word in words)
    if nothing or several or outside or none_of_several or shared:
        options = group_options(group)
        first = next((nearest(word, options) for word in value), "") if several else ""
        takes = "one option" if several else "the name of an option"
        if group == "tracking" and "none" in words:
            takes = "none, or names of trackers"
        raise UserError(f"{override}: {group} takes {takes}{first or '.'} Allowed: {', '.join(options)}.")
