"""All exit codes of runs by name, and the errors that carry them (docs/contracts.md; from sysexits where one fits).

Standard library, Python >= 3.6: the exit handler on the host uses it. The code of a process is only a hint; the cause
in ``attempts/<n>/cause.<rank>.json`` is authoritative.
"""

import errno
import logging
from typing import Any, Iterable, List

from flip.runs.credentials import scrub, scrub_stderr

COMPLETE = 0
DATA = 65  # a shard, a manifest or a record is missing or damaged
STORAGE = 69  # a disk, a network or a storage service failed: may pass by itself
CRASH = 70  # an unexpected error, or the echo of another process's end
HANG = 71  # no progress for too long
STOPPED = 75  # saved and ended because of a stop request: the next attempt continues
DIVERGED = 76  # the loss or weights are not finite
PERMISSION = 77  # a file is not accessible, or another user could change it
CONFIG = 78  # a configuration, a command line or an installation that the user must change

# Exit codes without a cause: what a launcher sees of a process that could not write one.
NODE_LOST = 68  # of an attempt whose coordinator of node agents has lost a node with ranks (sysexits' EX_NOHOST)
UNSTARTED = 73  # of a rank that could not open its log or its code (EX_CANTCREAT), of no other process
KILLED = 137  # by SIGKILL, as a shell shows it
TERMINATED = 143  # by SIGTERM

#: cause -> exit code, root causes before their echoes: the first cause present in an attempt is the cause of its end.
#: ``peer_lost`` is the echo of another process's end, never a root cause by itself.
CAUSES = {
    "config": CONFIG,
    "permission": PERMISSION,
    "data": DATA,
    "diverged": DIVERGED,
    "storage": STORAGE,
    "hang": HANG,
    "crash": CRASH,
    "complete": COMPLETE,
    "stopped": STOPPED,
    "peer_lost": CRASH,
}
PRECEDENCE = tuple(CAUSES)

#: File errors that pass by themselves or that an administrator fixes. The run is not at fault.
#: The second line has the errors of mounts (FUSE, Lustre, CIFS and others) that lost their server; macOS lacks two.
STORAGE_ERRNOS = tuple(number for number, name in errno.errorcode.items() if name in (
    "ENOSPC", "EDQUOT", "EIO", "ESTALE", "EROFS", "ETIMEDOUT", "EFBIG",
    "ENOTCONN", "ESHUTDOWN", "EHOSTDOWN", "EHOSTUNREACH", "EREMOTEIO", "ECOMM", "ENOLINK",
))  # fmt: skip


#: Errors of a full disk, or of a quota. On a shared file system all nodes meet them, whichever does first.
FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


class ScrubbedFormatter(logging.Formatter):
    """Formats lines of a log without credentials, whichever library wrote them."""

    def format(self, record: logging.LogRecord) -> str:
        return scrub(super().format(record))


def short(value: object) -> str:
    """The value as text for a message: its ``repr``; of a huge whole number its order of magnitude, such as 1e300."""
    text = repr(value)
    if not isinstance(value, int) or isinstance(value, bool) or len(text) <= 24:
        return text
    digits = text.lstrip("-")
    sign = "-" if text.startswith("-") else ""
    return "%s%se%d" % (sign, digits[0], len(digits) - 1)


def suggestion(typed: str, known: Iterable[str]) -> str:
    """The remedy "Did you mean ...?" with the known names most similar to ``typed``; empty if none is similar."""
    near = nearest(typed, known)
    if near:
        return "Did you mean %s?" % " or ".join(near)
    return ""


def nearest(typed: str, known: Iterable[str]) -> List[str]:
    """At most three known names that are similar to ``typed``, the most similar first."""
    import difflib  # only for errors: --help must be quick

    return difflib.get_close_matches(typed, sorted(known))


def describe(error: BaseException) -> str:
    """Class, message and notes of an unexpected error, in one line and without credentials: it leaves the process."""
    text = "%s: %s" % (type(error).__name__, error)
    return scrub("; ".join([text, *getattr(error, "__notes__", ())]))


def start_logging(stream: Any, prefix: str = "") -> None:
    """Log from level INFO to ``stream``, each line with the time, ``prefix`` and the level.

    Credentials are removed from these lines and from everything else that Python writes to standard error.
    """
    scrub_stderr()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(ScrubbedFormatter("%(asctime)s " + prefix + "%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class FlipError(Exception):
    """An expected failure, shown to the user as one message without a traceback.

    Subclasses set ``cause``, a key of CAUSES, and with it the exit code.

    Args:
        what: what went wrong.
        where: the file, the key, or both.
        value: the wrong value; None: not shown.
        remedy: what the user can do, as sentences.
    """

    cause = "crash"

    def __init__(self, what: str, where: object = "", value: object = None, remedy: str = "") -> None:
        self.what = what
        self.where = str(where)
        self.value = value
        self.remedy = remedy
        super().__init__(self.paragraph())

    @property
    def code(self) -> int:
        return CAUSES[self.cause]

    def _render_traceback_(self) -> List[str]:
        """What a notebook (IPython) shows in place of the traceback: the message alone."""
        return ["%s: %s" % (type(self).__name__, self)]

    def paragraph(self) -> str:
        """The message "WHERE: WHAT (found: VALUE). REMEDY", printable and without credentials."""
        if self.where:
            text = "%s: %s" % (self.where, self.what)
        else:
            text = self.what
        if self.value is not None:
            text += " (found: %s)" % short(self.value)
        text = text.rstrip(".") + "."
        text = scrub(text + " " + self.remedy if self.remedy else text)
        # a key or a path may contain anything: show line breaks and escape sequences of a terminal as text
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class ConfigError(FlipError):
    """A configuration or a command line is invalid, or names a file that does not exist: the user must change it.

    A missing shard or manifest is a DataError.
    """

    cause = "config"


class DataError(FlipError):
    """A shard, a manifest or a record is missing or damaged."""

    cause = "data"


class StorageError(FlipError):
    """A disk, a network or a storage service failed. The run is started again later."""

    cause = "storage"


class PermissionDenied(FlipError):
    """A file is not accessible, or another user could change it."""

    cause = "permission"


class Diverged(FlipError):
    """The loss or weights are not finite."""

    cause = "diverged"


class Superseded(FlipError):
    """A newer attempt owns the run: this one exits and writes nothing more."""

    cause = "stopped"


class PeerLost(FlipError):
    """Another rank ended, so this one cannot continue. An echo, never a root cause."""

    cause = "peer_lost"


def read_error(error: OSError, what: str, where: object, remedy: str = "") -> FlipError:
    """The error for a file that cannot be read: StorageError for STORAGE_ERRNOS, else ConfigError."""
    text = "%s: %s" % (what, error.strerror)
    if error.errno in STORAGE_ERRNOS:
        return StorageError(text, where)
    return ConfigError(text, where, remedy=remedy)
