"""Shared by all commands: option parser, exit codes, notes, and command lines to show.

Imported before arguments are parsed, so it imports nothing large.
"""

import argparse
import contextlib
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.common.paths import JOBS, REPOSITORY, install_command

CUT_OFF = 141
"""Exit code if the reader of a pipe has closed it, as shells report SIGPIPE."""
INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, as in shells."""
DEFAULTS = {"quiet": False, "verbose": False, "json": False}
"""Values of the common options if they are not given."""

_REFUSED = "_refused_number"
"""Attribute of the parsed options: (why, option, value) of a number out of its bounds."""

_options = argparse.Namespace(**DEFAULTS)
"""Options of the command that runs, set by ``run_command``."""


class Number:
    """The ``type`` of a numeric option: a finite number within bounds.

    A text that is no number is a usage error. ``run_command`` raises ConfigError for a number out of bounds.

    Args:
        kind: ``int`` or ``float``.
        least: the smallest value.
        above: every value is larger than this.
        most: the largest value.
        below: every value is smaller than this.
    """

    def __init__(
        self,
        kind: type[int] | type[float],
        least: float | None = None,
        above: float | None = None,
        most: float | None = None,
        below: float | None = None,
    ) -> None:
        self.__name__ = kind.__name__  # argparse prints it: "invalid int value"
        self._kind = kind
        self._least = least
        self._above = above
        self._most = most
        self._below = below

    def __call__(self, text: str) -> float:
        try:
            return self._kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(self._spelling(text)) from None

    def _spelling(self, text: str) -> str:
        """Why a text is no number, and how it is written."""
        if self._kind is float:
            return f"must be a number (found: {text!r})"
        return f"must be a whole number (found: {text!r}){_spelled(text)}"

    def problem(self, value: float) -> str:
        """Why a value is refused; empty if it is not."""
        if not math.isfinite(value):
            return "must be a finite number"
        if self._least is not None and value < self._least:
            return f"must be at least {self._least:g}"
        if self._above is not None and value <= self._above:
            return f"must be above {self._above:g}"
        if self._most is not None and value > self._most:
            return f"must be at most {self._most:g}"
        if self._below is not None and value >= self._below:
            return f"must be below {self._below:g}"
        return ""


def _spelled(text: str) -> str:
    """A hint how a whole number, or several, are written; empty if the text is neither."""
    bounds = re.fullmatch(r"([0-9]{1,4})-([0-9]{1,4})", text)
    if bounds:
        first = int(bounds[1])
        return f". Write each number: {first} {first + 1} ... {bounds[2]}"
    if re.fullmatch(r"[0-9]+([,;][0-9]+)+", text):
        return f". Separate several by spaces: {' '.join(re.findall('[0-9]+', text))}"
    try:
        number = float(text)
    except ValueError:
        return ""
    if abs(number) < 1e15 and number.is_integer():
        return f". Write {int(number)}"
    return ""


COUNT = Number(int, least=1)
"""The ``type`` of an option that counts things, at least one."""
INDEX = Number(int, least=0)
"""The ``type`` of an option that is a position, a seed, or a count that may be zero."""
AMOUNT = Number(float, above=0)
"""The ``type`` of an option that is a duration or a rate."""


class Parser(argparse.ArgumentParser):
    """The parser of every command and subcommand.

    It adds the common options, accepts options between positional arguments, refuses abbreviated options, and names
    the nearest known option or choice in its errors. A numeric option has a ``Number`` as its type.
    ``json=False``: for a command without a result to print.
    """

    def __init__(self, *args: Any, json: bool = True, **options: Any) -> None:
        defaults: dict[str, Any] = {"formatter_class": _HelpFormatter}
        super().__init__(*args, **{**defaults, **options, "allow_abbrev": False})
        self.register("action", None, _StoreValue)
        group = self.add_argument_group("common options")
        flag: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}  # the same before a subcommand
        if json:
            group.add_argument("--json", **flag, help="print the result as one JSON document; notes go to stderr")
        amount = group.add_mutually_exclusive_group()
        amount.add_argument("-q", "--quiet", **flag, help="print only the result and errors")
        amount.add_argument("-v", "--verbose", **flag, help="also print debug log lines, on stderr")
        group.add_argument("--version", action="version", version=version(), help="print the version")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
            from jobs.common.completion import complete

            complete(self)
        if self._subparsers:
            parse = self.parse_known_args
        else:
            parse = self.parse_known_intermixed_args
        options, unknown = parse(args, namespace or argparse.Namespace(**DEFAULTS))
        if unknown:
            from flip.runs.errors import nearest

            parser = self._chosen(sys.argv[1:] if args is None else args)
            near = [nearest(word.partition("=")[0], parser._options())[:1] for word in unknown]
            hints = [f" (did you mean {names[0]}?)" if names else "" for names in near]
            unknown_arguments = (word + hint for word, hint in zip(unknown, hints, strict=True))
            parser.error(f"unrecognized arguments: {' '.join(unknown_arguments)}")
        return options

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            from flip.runs.errors import suggestion

            error.message = f"{error.message} {suggestion(str(value), map(str, action.choices or ()))}".rstrip()
            raise

    def _chosen(self, words: Sequence[str]) -> "Parser":
        """The parser of the subcommand among ``words``: options of others do not help. Without one, this parser."""
        choices: dict[str, Parser] = {}
        for action in self._subparsers._group_actions if self._subparsers else ():
            choices |= {name: each for name, each in (action.choices or {}).items()}  # type: ignore[attr-defined]
        return next((choices[word] for word in words if word in choices), self)

    def _options(self) -> set[str]:
        """Long options, including those of subcommands."""
        from jobs.common.completion import actions_of

        return {name for action in actions_of(self) for name in action.option_strings if name.startswith("--")}


def version() -> str:
    """The version, the folder of the code, and the interpreter."""
    from flip.version import __version__

    return f"flip {__version__} ({Path(__file__).resolve().parents[2]}, Python {sys.version.split()[0]})"


def add_root_option(parser: argparse.ArgumentParser) -> None:
    """Add --root, whose value ``jobs.common.cluster_profile.roots`` takes."""
    parser.add_argument(
        "--root", help="folder of run directories; default: FLIP_RUNS, else ./runs, then the runs_root of each profile"
    )


def add_run_arguments(parser: argparse.ArgumentParser, all_runs: bool = True) -> None:
    """Add the arguments that name runs, and --root, for ``jobs.submitted_runs.select.chosen``.

    ``all_runs``: whether no argument means all runs; else one is required.
    """
    help_text = "sweeps, SWEEP/RUN, patterns of it, or folders; with a leading ! they exclude runs"
    if all_runs:
        number = "*"
        default = "; default: all runs"
    else:
        number = "+"
        default = ""
    parser.add_argument("target", nargs=number, help=help_text + default)
    add_root_option(parser)


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments ``SWEEP [KEY=VALUE ...]``, parsed to ``sweep`` and ``overrides``, and --sweep for the first."""
    help_text = "the sweep file, or its name in this folder or in sweeps/"
    parser.add_argument("name", nargs="?", metavar="SWEEP", help=help_text)
    help_text = "settings that override those of the sweep"
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", action=_SweepWords, help=help_text)
    parser.add_argument("--sweep", metavar="SWEEP", help="the sweep as an option")


def run_command(work: Callable[[Any], int], options: argparse.Namespace) -> int:
    """Call ``work(options)`` and return its exit code.

    A FlipError is printed to standard error, with --json as JSON, and its exit code is returned.
    """
    import logging  # after parsing: --help must be fast

    from flip.runs.errors import FlipError, ScrubbedFormatter

    global _options
    before = _options
    _options = options
    logging.disable(logging.WARNING if options.quiet else logging.NOTSET)
    if options.verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(ScrubbedFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(handlers=[handler])
        for package in ("flip", "jobs", "tools"):
            logging.getLogger(package).setLevel(logging.DEBUG)
    try:
        _refuse_number(options)
        return work(options)
    except FlipError as error:
        logging.getLogger(__name__).debug("the error was raised here", exc_info=True)
        print(_json_error(error) if options.json else str(error), file=sys.stderr)
        return error.code
    finally:
        logging.disable(logging.NOTSET)
        _options = before


def note(text: str) -> None:
    """Print progress or a hint, not the result: on standard error with --json; nothing is printed with --quiet."""
    if text and not _options.quiet:
        print(text, file=sys.stderr if _options.json else sys.stdout, flush=True)


def confirm(question: str) -> bool:
    """Ask a yes-or-no question on the terminal; only yes returns True. Raises ConfigError if ``can_ask`` is False."""
    from flip.runs.errors import ConfigError

    if not can_ask():
        if _options.json:
            why = "the question cannot be shown with --json"
        else:
            why = "stdin is not a terminal"
        raise ConfigError(f"confirmation needed, but {why}", value=question, remedy="Add --yes.")
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def can_ask() -> bool:
    """Whether ``confirm`` can show a question."""
    return not _options.json and sys.stdin.isatty()


def quiet() -> bool:
    """Whether the command was started with --quiet."""
    return bool(_options.quiet)


def run_main(main: Callable[[], int]) -> int:
    """Call ``main()``, flush its output, and return its exit code.

    The exit code is CUT_OFF if the pipe is closed, STORAGE if standard output cannot be written, INTERRUPTED after
    Ctrl-C, and CONFIG if a package is missing or the current folder was deleted. SIGTERM ends the command by
    SystemExit, unless it has a handler of its own.

    The current folder, which may hold files of another user, is not on the module path of the command and its children.
    """
    from flip.files.python_path import leave_current_folder

    try:
        os.getcwd()
    except FileNotFoundError:
        print("the current folder has been deleted. Change to another one: cd", file=sys.stderr)
        from flip.runs.errors import CONFIG

        return CONFIG
    leave_current_folder()
    try:
        with _sigterm_as_exit():
            try:
                return main()
            finally:
                print(end="", flush=True)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("flip", "jobs", "tools"):
            raise
        remedy = f"Run `{install_command()}`."
        if (REPOSITORY / "Makefile").is_file():
            remedy = "Run `make install`, then `source .venv/bin/activate`."
        print(f"{error.name} is not installed for this Python ({sys.executable}). {remedy}", file=sys.stderr)
        from flip.runs.errors import CONFIG

        return CONFIG
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if _is_of_output(error):
            return output_failed(error)
        _scrub_traceback()
        raise
    except Exception:
        _scrub_traceback()
        raise


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Raise SystemExit on SIGTERM: temporary folders go, child processes end and the terminal shows its cursor again.

    The default action would end the process at once and do none of it.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # ignored by who started the command
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def output_failed(error: OSError) -> int:
    """Report that output cannot be written, and return the exit code: CUT_OFF if its reader has gone, else STORAGE."""
    if isinstance(error, BrokenPipeError):
        discard_output()
        return CUT_OFF
    from flip.runs.errors import STORAGE

    with contextlib.suppress(OSError):  # standard error may have the same device
        print(f"the output cannot be written: {error.strerror}. Write it to another place.", file=sys.stderr)
    discard_output()
    return STORAGE


def _is_of_output(error: OSError) -> bool:
    """Whether an error is one of writing to an open stream: such an error names no file."""
    from flip.runs.errors import STORAGE_ERRNOS

    if isinstance(error, BrokenPipeError):
        return True
    return error.filename is None and error.errno in STORAGE_ERRNOS


def _scrub_traceback() -> None:
    """Leave out credentials in the traceback that the interpreter prints to standard error."""
    from flip.runs.credentials import scrub_stderr  # only now: --help must be fast

    scrub_stderr()


def discard_output() -> None:
    """Write no more to standard output and error, which are closed: buffered output would raise again at the exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for handle in (1, 2):
        os.dup2(devnull, handle)


def command(name: str, *words: object) -> str:
    """A command line for users to copy: it works in any folder, with the program by which this command was started.

    Words are quoted. Paths among them must be absolute.
    """
    return shlex.join([*_program(), name, *map(str, words)])


class _StoreValue(argparse.Action):
    """Stores the value of an option, and records in the namespace why ``run_command`` must refuse it."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        if not isinstance(self.type, Number):
            return
        given = values if isinstance(values, list) else [values]
        for value in given:
            problem = self.type.problem(value)
            if problem:
                setattr(namespace, _REFUSED, (problem, option or self.dest, value))


def _refuse_number(options: argparse.Namespace) -> None:
    """Raise ConfigError if an option is a number out of its bounds."""
    refused = getattr(options, _REFUSED, None)
    if refused:
        from flip.runs.errors import ConfigError

        raise ConfigError(*refused)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows ``[options]`` in the usage in place of each option that can be left out."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        if prefix is None:  # argparse passes a prefix to form the name of a subcommand
            self._prog += " [options]"
        groups = [group for group in groups if group.required]
        needed = [action for group in groups for action in group._group_actions]
        needed += [action for action in actions if action.required or not action.option_strings]
        super().add_usage(usage, needed, groups, prefix)


class _SweepWords(argparse.Action):
    """Separates the sweep from the settings. Options are parsed before, positional arguments in order."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, *_: Any) -> None:
        positionals = [*filter(None, [namespace.name]), *values]
        del namespace.name
        if namespace.sweep is None:
            if not positionals or "=" in positionals[0]:
                parser.error("the sweep is missing: give its file, or its name in sweeps/")
            namespace.sweep, *positionals = positionals
        namespace.overrides = positionals


def _json_error(error: Any) -> str:
    """A FlipError as one line of JSON, for programs."""
    import json

    fields = {"what": error.what, "where": error.where, "value": error.value, "remedy": error.remedy}
    document = {**_plain(fields), "code": error.code, "message": str(error)}
    return json.dumps({"error": document}, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """The value as plain JSON data, without credentials."""
    from flip.runs.credentials import scrub

    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return scrub(str(value))


def _program() -> list[str]:
    """``flip`` if the shell finds the one that was started; else its path, or this interpreter and the folder jobs/."""
    started = Path(sys.argv[0])
    if started.name != "flip":
        return [sys.executable, str(JOBS)]
    import shutil

    if shutil.which("flip") == str(started):
        return ["flip"]
    return [str(started.absolute())]
