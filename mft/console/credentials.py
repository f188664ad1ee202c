"""Passwords and keys: detected in addresses, and hidden wherever text leaves this process.

Values that a config takes from the environment, `${oc.env:NAME}`, are kept as they are written: what was read
is remembered here, and hidden in all that is printed, logged or sent to a tracker.
"""

from __future__ import annotations

import os
import re
import unicodedata
from urllib.parse import unquote

SECRET = (
    r"pass(?:word|wd|phrase)?|pwd|token|secret|api[_-]?key|access[_-]?key|private[_-]?key"
    r"|auth\w*|credentials?|sig"
)
"""What the name of a parameter of an address holds where its value is a secret."""

HARMLESS = re.compile(
    r"(ssl\w*(?<!password)|charset|driver|connect_timeout|application_name|target_session_attrs|encrypt|"
    r"trustservercertificate|trusted_connection|unix_socket|timeout|mode|cache|host|port)",
    re.IGNORECASE,
)
"""Parameters that the address of a database may hold in plain text."""

ADDRESS = re.compile(r"(^|[._])(uri|url|endpoint|address|addr|proxy|proxies|host)$")
"""Keys whose values are addresses."""

SECRET_KEY = re.compile(
    r"(^|\.)((\w+_)?(password|passwd|pwd|passphrase|secret|credentials?|(api|access|private|secret)_?key)"
    r"|((access|api|auth|bearer|hf|secret)_)?token)$",
    re.IGNORECASE,
)
"""Keys whose values are secrets, such as a plug-in's api_key; eos_token is none."""

_TASK = re.compile(r"(^|\.)(task|\w+_by_task)\.[^.]+$")
"""Keys that end with the name of a task, which may be any word."""

_NO_SECRET = re.compile(r"|null|true|false|-?\d{1,4}|-?\d*\.\d*(e-?\d+)?")
"""Values of a SECRET_KEY that are none: a switch, a weight, a small count."""

_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^{},\s]+)\s*(?:,([^{}]*))?\}")
_USERINFO = re.compile(r"(?<=://)(?![\w.-]+:\d{1,5}/)[^\s'\"]*@")  # but not the @ in a path behind host:port/
_WHOLE_USERINFO = re.compile(r"(?<=://)(?![\w.-]+:\d{1,5}/).*@", re.DOTALL)  # of a text that is one address
# user:password@host; hf:owner/name@revision is a data set
_NO_SCHEME = re.compile(r"(?<![\w/:.*{$-])(?!hf:)[^\s'\"=/:@,\[\]{}()]+:(?!//)[^\s'\"@]+@(?=[\w.$*-])")
_PARAMETER = re.compile(
    rf"([?&;#]|%3F|%26|%23)([\w.-]*(?:{SECRET}|(?<![\w])key)[\w.-]*)=[^&;\s'\"#]+", re.IGNORECASE
)
_SHORTEST = 5  # characters of a remembered value; shorter ones stand in too many words

_remembered: dict[str, str] = {}


def remember(value: str, variable: str) -> None:
    """Notes a value that was read from an environment variable, so that it is shown as it is written."""
    if len(value) >= _SHORTEST:
        _remembered[value] = f"${{oc.env:{variable}}}"


def hidden(text: str) -> str:
    """Returns text with credentials of the addresses in it as ***, and values of the environment as
    written."""
    text = as_written(text)
    for pattern in (_USERINFO, _NO_SCHEME):
        text = pattern.sub(lambda match: match[0] if _of_environment(match[0][:-1]) else "***@", text)
    return _PARAMETER.sub(
        lambda m: m[0] if _ENVIRONMENT.match(m.string, m.end(2) + 1) else f"{m[1]}{m[2]}=***", text
    )


def _of_environment(user: str) -> bool:
    """Whether `user:password` has a password only by a variable, which is not a secret."""
    name, _, password = _ENVIRONMENT.sub("", user).partition(":")
    return "${" in user and not password and (not name or ":" in user.partition("${")[0])


def as_written(text: str) -> str:
    """Returns text with values that came from the environment as they are written in the config."""
    for value in sorted(_remembered, key=len, reverse=True):  # one value may be part of a longer one
        text = text.replace(value, _remembered[value])
    return text


def filled(text: str) -> str:
    """Returns what `as_written` made of a text with the variables' values in it again; KeyError for one not
    set."""
    for match in _ENVIRONMENT.finditer(text):
        remember(os.environ[match[1]], match[1])
    return _ENVIRONMENT.sub(lambda match: os.environ[match[1]], text)


def without_credentials(uri: str) -> str:
    """Returns an address without user, password, fragment and all parameters that could be secret."""
    uri = _WHOLE_USERINFO.sub("", uri)  # first, since a password may hold ? and # as well
    address, question, query = uri.partition("#")[0].partition("?")
    kept = [part for part in query.split("&") if HARMLESS.fullmatch(part.partition("=")[0])]
    return address + (question + "&".join(kept) if kept else "")


def written_out(text: str, key: str = "") -> bool:
    """Whether a text as it stands in a config has a user, a password or a key written out: an address, or the
    value of a SECRET_KEY.

    `${oc.env:NAME}` in their place is none. key: where it stands, which says whether all of the text is an
    address.
    """
    text = _ENVIRONMENT.sub(
        lambda match: "\0" + ("" if (match[2] or "null").strip() == "null" else match[2]), text
    )
    bare = text.replace("\0", "").strip(" '\"").lower()
    if SECRET_KEY.search(key) and not _TASK.search(key) and not _NO_SECRET.fullmatch(bare):
        return True
    for _ in range(3):  # percent signs may be escaped themselves
        text = unicodedata.normalize("NFKC", text)
        if _in_plain(text.strip(" '\"[]"), ADDRESS.search(key) is not None):
            return True
        text = unquote(text)
    return False


def _in_plain(text: str, address: bool) -> bool:
    """text: with \\0 for what comes from the environment."""
    if not re.match(r"(sqlite|file)(\+\w+)?:/", text, re.IGNORECASE):  # an @ in a local path is part of it
        users = re.findall(r"://([^\s'\"]*)@", text) or (re.findall(r"(\S*)@", text) if address else [])
        for user in users:
            password = user.partition(":")[2] if "\0" in user else user
            if password.replace("\0", ""):
                return True
    if not address and "://" not in text:
        return False
    for part in re.split(r"[?&;#]", text)[1:]:
        name, _, value = part.partition("=")
        value = value.replace("\0", "")
        if value and re.search(rf"({SECRET}|^key$)", name, re.IGNORECASE):
            return True
        # An address may be any program's: what is not known to be harmless counts, and what has no value.
        unknown = not HARMLESS.fullmatch(name) and part.replace("\0", "")
        if address and unknown and (value or "=" not in part):
            return True
    return False
