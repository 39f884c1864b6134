"""Credentials in texts: what may not be stored in a setting, and what is removed from a text that leaves the process.

``exposes`` checks a setting; ``scrub`` replaces credentials in a text by ``...``: user names and passwords in
addresses, their parameters, assignments such as ``password=...``, HTTP headers, and the values of this process's secret
variables.
Standard library, Python >= 3.6.
"""

import json
import os
import re
import sys
import threading
import urllib.parse
from typing import Any, List, Match

#: Variables whose values are secret. Names of files are not.
SECRET_VARIABLE = re.compile(
    r"(?!.*_(?:FILE|PATH|DIR)\Z)(?:.*_)?(?:SECRET(?:_.*)?|TOKEN|KEY|\w*PASSWORD|PASSWD|PASSPHRASE)\Z", re.IGNORECASE
)
#: A shorter value of a secret variable stays in texts: it could be a common word, as ``none`` or ``default``.
SHORTEST_VALUE = 8

#: Parameters of an address that are no credentials. All others are refused in settings and removed from texts.
HARMLESS_PARAMETERS = frozenset([
    "continuation-token", "delimiter", "download", "encoding-type", "format", "generation", "list-type", "location",
    "marker", "max-keys", "max-uploads", "page", "part-number-marker", "partnumber", "prefix", "ref", "region",
    "revision", "start-after", "upload-id-marker", "uploadid", "uploads", "version", "versionid", "versions", "x-id",
])  # fmt: skip

#: Schemes whose addresses have a container before the @: ``abfs://container@account/path``.
_CONTAINER_SCHEMES = ("abfs", "abfss", "wasb", "wasbs")
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]{0,20}"
#: All up to the last @ before the path; with a colon also beyond a slash, which a password may contain. A user and a
#: password are removed also if a slash of :// is missing: the address is none, but the password may be one.
_USERINFO = re.compile(
    r"(%s:)(?://([^\s/?#]{0,512}@|[^\s/?#@:]{0,128}:\S{0,512}@)|/([^\s/?#@:]{1,128}:\S{1,512}@))" % _SCHEME
)
_WORD = re.compile(r"[^\s\"'<>]+")
_BEFORE_QUERY = re.compile(r".*?://[^?#]*")
_PAIR = re.compile(r"([?&;#]+)([^=&;#]*)(=?)([^&;#]*)")
#: Names of credentials wherever they are assigned; a word such as ``key`` or ``token`` alone is none.
_NAME = (
    r"[\w.-]{0,60}(?:secret(?:[_-]?access)?(?:[_-]?key)?|passw(?:or)?d|passphrase|(?:api|access|account|private)[_-]?key"
    r"|(?:access|auth|client|id|refresh|security|session)[_-]?token)"
)
#: Names of credentials among the parameters of an address.
_PARAMETER = r"[\w-]{0,60}(?:key|sig|signature|credential|token|secret|password|passwd)"
_HEADER = r"(?:(?:proxy-)?authorization|cookie)"
_VALUE = r"(\"[^\"\n]*\"?|'[^'\n]*'?|[^\s\"'&]+)"
_PATTERNS = (
    # parameters of a part of an address, as clients log it: GET /x?token=...
    (re.compile(r"(?<=[?&#;])(%s)=[^&\s'\"]+" % _PARAMETER, re.I), r"\1=..."),
    (re.compile(r"(?<![A-Za-z0-9])(%s[\"']?\s{0,3}[=:]\s{0,3})%s" % (_NAME, _VALUE), re.I), r"\1..."),
    (re.compile(r"\b([A-Z][A-Z0-9_]{0,60}_(?:TOKEN|KEY)=)%s" % _VALUE), r"\1..."),
    (re.compile(r"\b(%s[\"']?\s{0,3}[:=]\s{0,3}(?:b?[\"'])?)[^\r\n\"']+" % _HEADER, re.I), r"\1..."),
    (re.compile(r"\b(Signature|Credential)=[^\s,&\"']+"), r"\1=..."),
    (re.compile(r"\b(bearer\s{1,3})(?!(?:tokens?|auth\w*)\b)[\w.~+/=-]+", re.I), r"\1..."),
)  # fmt: skip


def scrub(text: str) -> str:
    """Replace the credentials in a text by ``...``."""
    for value in _secret_values():
        text = text.replace(value, "...")
    return _scrub_patterns(text)


def exposes(setting: str) -> bool:
    """Whether a setting contains credentials: user information or unknown parameters of an address, or an assignment.

    The variables of this process do not count: whether a setting is valid must not depend on them.
    """
    return _scrub_patterns(setting) != setting


def _scrub_patterns(text: str) -> str:
    text = _USERINFO.sub(_without_userinfo, text)
    text = _WORD.sub(_without_parameters, text)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def _without_userinfo(match: "Match[str]") -> str:
    scheme, userinfo, of_single_slash = match.groups()
    if of_single_slash:
        return scheme + "/...@"
    if scheme[:-1].lower() in _CONTAINER_SCHEMES and ":" not in userinfo:
        return match.group()
    return scheme + "//...@"


def _without_parameters(match: "Match[str]") -> str:
    word = match.group()
    if "://" not in word:
        return word
    end = _BEFORE_QUERY.match(word).end()  # type: ignore[union-attr]
    return word[:end] + _PAIR.sub(_without_value, word[end:])


def _without_value(match: "Match[str]") -> str:
    before, name, equals, value = match.groups()
    if not value or urllib.parse.unquote(name).lower() in HARMLESS_PARAMETERS:
        return match.group()
    return before + name + equals + "..."


def _secret_values() -> List[str]:
    """The values of the secret variables in the forms in which texts show them, the longest first."""
    forms = set()
    for name, value in os.environ.items():
        if SECRET_VARIABLE.match(name) and len(value) >= SHORTEST_VALUE:
            for part in [value] + value.split("\n"):
                forms.update(_forms(part))
    return sorted((form for form in forms if len(form) >= SHORTEST_VALUE), key=len, reverse=True)


def _forms(value: str) -> List[str]:
    """A value as it is, in an address, and with the escapes of JSON and Python."""
    value = value.encode("utf-8", "replace").decode("utf-8")  # a variable may hold any bytes
    quote = urllib.parse.quote
    return [
        value,
        quote(value),
        quote(value, safe=""),
        urllib.parse.quote_plus(value),
        json.dumps(value)[1:-1],
        repr(value)[1:-1],
    ]


class ScrubbedStream:
    """A text stream that removes credentials from each complete line before it is written. Threads may share it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._local = threading.local()

    def write(self, text: str) -> int:
        lines, newline, rest = (self._pending() + text).rpartition("\n")
        self._local.line = rest
        if newline:
            self._stream.write(scrub(lines) + newline)
        return len(text)

    def _pending(self) -> str:
        """The begun line of this thread."""
        return getattr(self._local, "line", "")

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        line = self._pending()
        self._local.line = ""
        if line:
            self._stream.write(scrub(line))
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def scrub_stderr() -> None:
    """Remove credentials from all that Python writes to standard error from now on: tracebacks, warnings, prints."""
    if sys.stderr is not None and not isinstance(sys.stderr, ScrubbedStream):
        sys.stderr = ScrubbedStream(sys.stderr)
