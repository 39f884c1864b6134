"""The exit codes of a run, and the errors that carry them (docs/contracts.md; values from sysexits where one fits).

Standard library, Python >= 3.6: the exit trap on the host reads this file with whatever Python is there.
The code of a process is only a hint; the cause it leaves in ``attempts/<n>/cause.<rank>.json`` is the fact.
"""

import logging
import re
from typing import Any

COMPLETE = 0
DATA = 65
STORAGE = 69
CRASH = 70
HANG = 71
STOPPED = 75
DIVERGED = 76
PERMISSION = 77
CONFIG = 78

#: cause -> exit code. ``peer_lost`` is the echo of somebody else's end, never a root cause by itself.
CAUSES = {
    "complete": COMPLETE,
    "data": DATA,
    "storage": STORAGE,
    "crash": CRASH,
    "peer_lost": CRASH,
    "hang": HANG,
    "stopped": STOPPED,
    "diverged": DIVERGED,
    "permission": PERMISSION,
    "config": CONFIG,
}

#: Root causes before their echoes: the first class present in an attempt is the cause of its end.
PRECEDENCE = (
    "config",
    "permission",
    "data",
    "diverged",
    "storage",
    "hang",
    "crash",
    "complete",
    "stopped",
    "peer_lost",
)


#: Name and password in an address, whose password may hold an @.
USERINFO = re.compile(r"(?<=://)[^/\s]+@")
#: Parameters of an address that are credentials, as those of signed URLs.
PARAMETERS = re.compile(
    r"(?<=[?&])((?:x-(?:amz|goog)-)?(?:sig|signature|credential|security-token|token|access_token|secret|password|api_?key))"
    r"=[^&\s'\"]+",
    re.IGNORECASE,
)


def scrub(text: str) -> str:
    """The text without names, passwords and credentials in its addresses."""
    return PARAMETERS.sub(r"\1=...", USERINFO.sub("...@", text))


class ScrubbedFormatter(logging.Formatter):
    """Formats lines of a log without credentials in addresses, whichever library wrote them."""

    def format(self, record: logging.LogRecord) -> str:
        return scrub(super().format(record))


def start_logging(stream: Any, words: str = "") -> None:
    """Log from level INFO on to ``stream``, each line with the time, ``words`` and the level."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(ScrubbedFormatter("%(asctime)s " + words + "%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class FlipError(Exception):
    """A mistake or a misfortune that we can name. Shown to users as one paragraph, never as a traceback.

    ``what`` went wrong, ``where`` (file, key), the offending ``value``, and the ``remedy``. Names and passwords in
    addresses are not shown.
    """

    cause = "crash"

    def __init__(self, what: str, where: object = "", value: object = None, remedy: str = "") -> None:
        self.what, self.where, self.value, self.remedy = what, str(where), value, remedy
        super().__init__(self.paragraph())

    @property
    def code(self) -> int:
        return CAUSES[self.cause]

    def paragraph(self) -> str:
        text = "%s: %s" % (self.where, self.what) if self.where else self.what
        if self.value is not None:
            text += " (found: %r)" % (self.value,)
        text = text.rstrip(".") + "."
        text = text + " " + self.remedy if self.remedy else text
        text = scrub(text)
        # a key or a path may hold anything; a line break or an escape sequence of a terminal shows as what it is
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class ConfigError(FlipError):
    cause = "config"


class DataError(FlipError):
    cause = "data"


class StorageError(FlipError):
    cause = "storage"


class PermissionDenied(FlipError):
    cause = "permission"


class Diverged(FlipError):
    cause = "diverged"


class Superseded(FlipError):
    """A newer attempt holds the run: this one leaves and writes nothing more."""

    cause = "stopped"


class PeerLost(FlipError):
    """Another rank ended; ours cannot go on. An echo, by class never a root cause."""

    cause = "peer_lost"
