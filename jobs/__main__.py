"""Runs one command: ``flip submit ...`` after ``make install``, or ``python -m jobs submit ...`` in the repository.

Each command is a module of ``jobs.commands`` or ``tools.commands`` whose ``main`` takes the words that follow its name.
``python /path/to/jobs submit ...`` does the same from any folder, without an installation.
"""

# Only modules that the interpreter has at its start: Ctrl-C during other imports, before `main`, prints a traceback.
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if sys.version_info < (3, 11):  # noqa: UP036  Python 3.6 and newer read this file
    version = ".".join(map(str, sys.version_info[:2]))
    sys.stderr.write(f"FLIP needs Python 3.11 or newer, and {sys.executable} is Python {version}. In {ROOT}, type\n")
    sys.stderr.write("  make install\n  source .venv/bin/activate\n")
    sys.exit(78)  # flip.runs.errors.CONFIG
if not __package__:  # python /path/to/jobs: the repository takes the place of jobs/ on the path
    sys.path[: 0 if sys.flags.safe_path else 1] = [ROOT]

GROUPS = {
    "train": {
        "jobs.commands.new": "write a short sweep on your own data",
        "jobs.commands.submit": "check a sweep, show its cost, start the missing runs",
        "jobs.commands.debug": "one run of a sweep in this process, under a debugger",
    },
    "look": {
        "jobs.commands.status": "state and progress of runs",
        "jobs.commands.explain": "one page about one run: state, cause, next step",
        "jobs.commands.logs": "output of the ranks of runs",
        "jobs.commands.report": "results as table, page, Markdown, CSV and figures",
        "jobs.commands.tensorboard": "TensorBoard over runs",
        "jobs.commands.follow": "send metrics to Weights & Biases, or another tracker",
    },
    "stop and delete": {
        "jobs.commands.cancel": "save, end and stop runs",
        "jobs.commands.rm": "move runs to the trash",
        "jobs.commands.clean": "delete the trash, old logs and unused code",
    },
    "use a model": {
        "jobs.commands.evaluate": "score checkpoints on data sets",
        "tools.commands.predict": "zero-shot prediction for image files",
        "tools.commands.export": "export to open_clip, timm, transformers or ONNX",
    },
    "data": {
        "tools.commands.shards": "make, index, verify and inspect tar shards",
        "tools.commands.tokenizer": "train or test a tokenizer",
        "tools.commands.prompts": "class names and templates of zero-shot data sets",
        "tools.commands.demo_data": "fetch and build the demonstration data",
    },
    "set up": {
        "jobs.commands.doctor": "check a Slurm cluster and write a profile for it",
        "jobs.commands.completion": "completion of commands in bash and zsh",
        "jobs.commands.schema": "JSON Schemas of sweeps and profiles, for editors",
        "tools.commands.slurm_sandbox": "a real Slurm on this machine",
    },
}
"""Group -> module of each command -> its description."""
USAGE = """usage: flip COMMAND ... (flip COMMAND --help)
{commands}

examples:
  flip new mine --data data/manifest
  flip submit quickstart --dry-run
  flip status quickstart --watch
  flip report quickstart
  flip shards index --help

every command: --quiet, --verbose, --version, --help; --json, but for
completion, debug, follow, tensorboard
exit codes: 0 complete, 2 wrong usage, 65 data, 69 storage or network,
75 stopped, start again, 77 permission, 78 configuration (docs/commands.md)
"""
PACKAGES = {module.rpartition(".")[2]: module.rpartition(".")[0] for modules in GROUPS.values() for module in modules}
"""Command -> the package of its module."""
OTHER_WORDS = {
    "run train start resume continue restart": "submit SWEEP",
    "list ls ps show info": "status",
    "stop kill abort": "cancel RUN",
    "delete remove": "rm RUN",
    "search find sweep tune": "submit tuning --dry-run",
    "plot compare results": "report",
    "eval score test": "evaluate RUN",
    "index make verify data": "shards --help",
    "init create": "new NAME --data MANIFEST",
    "help": "--help",
    "version": "--version",
}
"""Words that other programs have -> the rest of the command line that does it here."""


def main(arguments: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(argv)
    except KeyboardInterrupt:  # while the first modules are imported; later `cli.run_main` catches it
        print("interrupted", file=sys.stderr)
        return 130  # jobs.common.cli.INTERRUPTED


def _run(argv: list[str]) -> int:
    name = ""
    if argv and not argv[0].startswith("-"):
        name = argv[0].replace("-", "_")
    if "_ARGCOMPLETE" in os.environ:
        from jobs.common import completion

        name = completion.command(PACKAGES)
    if argv[:1] in (["-h"], ["--help"]):
        return _print(_usage())
    if name in PACKAGES:
        return _command(name, argv[1:])
    if not argv:
        print(_usage(), end="", file=sys.stderr)
        return 2
    if argv[0] == "--version":
        from jobs.common.cli import version

        return _print(version() + "\n")
    print(_unknown(argv), file=sys.stderr)
    return 2


def _command(name: str, words: list[str]) -> int:
    """Run a command of this name, and return its exit code."""
    import importlib

    from jobs.common import cli

    if PACKAGES[name].startswith("tools."):
        if not os.path.isdir(os.path.join(ROOT, "tools", "commands")):
            from flip.runs.errors import CONFIG  # not for --help, which must be quick

            place = os.path.join(ROOT, "tools")
            remedy = "Install FLIP into an environment of its own."
            print(f"{place} is another package's, so `flip {name}` is missing. {remedy}", file=sys.stderr)
            return CONFIG
        sys.path.insert(0, ROOT)  # an installed package of the same name must not hide tools/
    code = cli.run_main(lambda: importlib.import_module(f"{PACKAGES[name]}.{name}").main(words))
    if name == "debug":
        from jobs.runtime.rank_process import exit_process

        exit_process(code)  # threads of torch may abort a normal exit of the interpreter
    return code


def _usage() -> str:
    lines = []
    for title, modules in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {module.rpartition('.')[2]:14} {text}" for module, text in modules.items()]
    return USAGE.format(commands="\n".join(lines))


def _print(text: str) -> int:
    """Print a text that needs no other module, and return the exit code."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        from jobs.common.cli import output_failed

        return output_failed(error)
    return 0


def _unknown(argv: list[str]) -> str:
    """Two lines for a command line without a known command: the word, and the nearest command."""
    from flip.runs.errors import nearest

    word = argv[0].lower().replace("-", "_").strip("_")
    rest = next((line for words, line in OTHER_WORDS.items() if word in words.split()), "")
    if word == "help" and argv[1:2] and argv[1] in PACKAGES:
        rest = f"{argv[1]} --help"
    near = [rest] if rest else nearest(word, PACKAGES)
    hint = " or ".join(f"flip {line}" for line in near)
    if hint:
        hint = f" Did you mean: {hint}"
    if argv[0].startswith("-"):
        what = f"unknown option before a command: {argv[0]!r}. Options follow the command."
    else:
        what = f"unknown command: {argv[0]!r}."
    return f"{what}{hint}\nAll commands: flip --help"


if __name__ == "__main__":
    sys.exit(main())
