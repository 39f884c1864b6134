"""The page of the documents that ``--json`` prints, and of exit codes."""

from collections.abc import Iterator

from flip.config.json_schema import Node
from flip.runs.errors import CAUSES
from jobs.common.cli import CUT_OFF, INTERRUPTED
from jobs.common.documents import DOCUMENTS, schema_of
from jobs.common.next_commands import OF_STATE
from jobs.workloads.submitted import OF_MODELS
from lab.documentation.markdown import code, table

_HEAD = """# JSON documents and exit codes

`flip schema NAME` prints the JSON Schema of each document below. Their promise: a key keeps its name, type and
meaning. New keys may be added. `null` means unknown, or not written yet. Other commands print an object of their own
with `--json`, to which the same promise applies. [automation.md](../automation.md) shows them in use.
"""
_NEXT = """## Next commands

Key `next`, of a document or of each of its rows, lists command lines that usually follow. They work in any folder.
Commands about a run depend on its state; a job that evaluates has no `evaluate` and no `export`.

"""
_CODES = """## Exit codes

Of every command. An error is one paragraph on standard error: the fault, its place, the value, the remedy.
[restarts.md](../restarts.md#causes-and-exit-codes) says what follows from each cause.
"""
_MEANINGS = {
    0: "complete",
    1: "`audit`: known vulnerabilities",
    2: "wrong usage: an unknown command or option, a missing argument",
    65: "data: a shard, a manifest or a record is missing or damaged",
    69: "storage or network failed, or Slurm does not answer: try again later",
    70: "an unexpected error",
    71: "no progress for too long",
    75: "stopped and saved: start again",
    76: "the loss or weights are not finite",
    77: "a file is not accessible, or others could change it",
    78: "configuration: a value, a name or a file does not fit; a package is missing",
    INTERRUPTED: "interrupted by Ctrl-C",
    CUT_OFF: "the reader of the output has gone (closed pipe)",
}
_OF_RUNS = """
`--watch`, `--foreground` and `evaluate` return the code of their runs: of several the worst, where a failure counts
more than 75.
"""


def json_documents_page() -> str:
    """The page."""
    parts = [_HEAD]
    for name, (title, _) in DOCUMENTS.items():
        node = schema_of(name)
        is_list = node.get("type") == "array"
        item = node["items"] if is_list else node
        if keys := list(_keys(item)):
            about = "A list; each row has:" if is_list else "An object:"
            body = f"{about}\n\n{table(('key', 'type', 'meaning'), keys)}"
        else:
            body = "A list of texts.\n"
        parts.append(f"## {name}\n\nOf {title}.\n\n{body}")
    of_state = {**OF_STATE, "complete": (*OF_STATE["complete"], *OF_MODELS)}
    states = [(code(state), ", ".join(map(code, names))) for state, names in of_state.items()]
    parts.append(_NEXT + table(("state", "commands"), states))
    causes = {value: [cause for cause, known in CAUSES.items() if known == value] for value in _MEANINGS}
    rows = [(str(value), ", ".join(map(code, causes[value])), meaning) for value, meaning in _MEANINGS.items()]
    return "\n".join([*parts, _CODES, table(("code", "causes", "meaning"), rows), _OF_RUNS])


def _keys(node: Node, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, type, meaning) of an object and of the objects in it."""
    for key, below in node.get("properties", {}).items():
        yield code(prefix + key), _type(below), below.get("description", "")
        yield from _keys(below, f"{prefix}{key}.")
        yield from _keys(below.get("items", {}), f"{prefix}{key}[].")
        for choice in below.get("anyOf", ()):
            yield from _keys(choice, f"{prefix}{key}.")
    for pattern, below in node.get("patternProperties", {}).items():
        yield code(pattern), _type(below), below.get("description", "")


def _type(node: Node) -> str:
    if "anyOf" in node:
        return " or ".join(map(_type, node["anyOf"]))
    if "enum" in node:
        return ", ".join(map(code, node["enum"]))
    kind = node.get("type", "any")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array":
        return f"array of {_type(node['items'])}"
    return str(kind)
