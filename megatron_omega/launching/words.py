"""What users wrote, inside text that shells and schedulers read: data, never code. Quoted right, or refused.

Slurm reads the head of a batch script line by line; bash reads the rest, where `shlex` quotes. `deepspeed` hands a
command to pdsh, which puts it together with blanks and lets a shell on every host read it: words with a blank stand in
double quotes there, all others in none. What that shell or pdsh itself would expand is refused.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from megatron_omega.errors import ConfigError

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NAME = re.compile(r"[^\w.+@=-]", re.ASCII)
_OPTION = re.compile(r"--?[A-Za-z][^\"'\\#]*")
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)
_BARE = re.compile(r"[\w@+=:,./^-][\w@+=:,./~^-]*")
"""A word that a shell takes as it stands, without quotes."""
_QUOTED = re.compile(r"[^$`\\!%]*")
"""A word that a shell takes as it stands, in double quotes, and pdsh does not fill in."""


def one_line(what: str, text: str) -> str:
    """Return `text`, for a comment or a line of a head. Raises ConfigError if it holds a line break or another control.

    >>> one_line("--config", "runs/a b")
    'runs/a b'
    """
    if _CONTROL.search(text):
        raise ConfigError(f"{what} {text!r} holds a control character; scripts are not written with one: leave it out")
    return text


def quoted(what: str, words: Iterable[str]) -> str:
    """Return words as bash reads them back. Raises ConfigError for control characters."""
    return shlex.join([one_line(what, word) for word in words])


def one_word(what: str, text: str) -> str:
    """Return a word that bash takes as it stands. Raises ConfigError."""
    if not re.fullmatch(r"[\w.-]+", text, re.ASCII):
        raise ConfigError(f"{what} {text!r}: needed is one word of letters, digits, dots and dashes")
    return text


def job_name(text: str) -> str:
    """Return a name that Slurm takes whole and a file can bear.

    >>> job_name("exp #1 $(id)"), job_name("-x/../y"), job_name("")
    ('exp__1___id_', 'x_.._y', 'run')
    """
    return _NAME.sub("_", text).lstrip("-.") or "run"


def sbatch_option(option: str) -> str:
    """Return an option as the head of a batch script holds it. Raises ConfigError where Slurm would read another.

    >>> sbatch_option("--partition=gpu"), sbatch_option("--comment=two words")
    ('--partition=gpu', '"--comment=two words"')
    """
    if not _OPTION.fullmatch(one_line("--sbatch", option)):
        raise ConfigError(
            f"--sbatch={option} is no option that the head of a batch script can hold; write it as in "
            "--sbatch=--partition=gpu, without quotes, backslashes and #"
        )
    return f'"{option}"' if " " in option else option


def time_limit(text: str) -> str:
    """Return a time limit. Raises ConfigError for what is none to Slurm."""
    if not _TIME.fullmatch(text):
        raise ConfigError(
            f"--time {text!r} is no time limit; write hours:minutes:seconds or days-hours, as in 24:00:00"
        )
    return text


def require_hosts(hosts: Sequence[str]) -> None:
    """Raise ConfigError with everything that is wrong with a list of hosts."""
    findings = [
        f"--hosts {host!r} is no name of a host; write the name of each one, as in n1 n2 (bash makes them of n{{1..2}})"
        for host in dict.fromkeys(hosts)
        if not _HOST.fullmatch(host)
    ]
    findings += [
        f"--hosts names {host} {count} times; a host has all its ranks in one line: name it once, and give "
        "--ranks-per-node"
        for host, count in Counter(hosts).items()
        if count > 1
    ]
    if findings:
        raise ConfigError(*findings)


def require_port(port: int) -> None:
    """Raise ConfigError for what is no port that ranks can meet at."""
    if not 0 < port < 1 << 16:
        raise ConfigError(f"--port {port} is not a port; give a number from 1024 to 65535")


def require_words_for_pdsh(words: Sequence[str], places: Mapping[str, str], values: Mapping[str, str]) -> None:
    """Raise ConfigError with everything that the shells on the other hosts would not take as it stands.

    words: of the run's command line. places: what stands bare in the command (name -> path). values: variables that are
    handed on, in double quotes.
    """
    findings = [
        f"{word!r} would not reach ranks on other hosts as it stands: pdsh hands it to a shell there. Set it in the "
        "file of --config, or rename it" + _HINT * (" " not in word)
        for word in words
        if not _reaches(word)
    ]
    findings += [
        f"{name} {path!r} cannot be handed to other hosts by pdsh: use one of letters, digits and ./_-"
        for name, path in places.items()
        if not _BARE.fullmatch(path)
    ]
    findings += [
        f"the variable {name}={value!r} cannot be handed to other hosts by pdsh: take quotes, $, %, ` and \\ out of it"
        for name, value in values.items()
        if not _QUOTED.fullmatch(value) or '"' in value or _CONTROL.search(value)
    ]
    if findings:
        raise ConfigError(*findings)


_HINT = " (lists and mappings pass with a blank inside: '[1, 2]')"


def _reaches(word: str) -> bool:
    if _CONTROL.search(word):
        return False
    return _QUOTED.fullmatch(word) is not None if " " in word else _BARE.fullmatch(word) is not None
