"""Runs one command: ``flip submit ...`` after ``make install``, or ``python -m jobs submit ...`` in the repository.

Each command is a module of ``jobs.commands`` or ``tools.commands`` whose ``main`` takes the words that follow its name.
``python /path/to/jobs submit ...`` does the same from any folder, without an installation.
"""

# Only modules that the interpreter has at its start: Ctrl-C during other imports, before `main`, prints a traceback.
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if not __package__:  # python /path/to/jobs: the repository takes the place of jobs/ on the path
    sys.path[: 0 if sys.flags.safe_path else 1] = [ROOT]

COMMANDS = {
    "jobs.commands": {
        "new": "write a short sweep on your own data",
        "submit": "check a sweep, show its cost, start the runs that are missing",
        "status": "state and progress of runs",
        "logs": "output of the ranks of runs",
        "cancel": "save, end and stop runs",
        "clean": "delete the trash, old logs and unused code",
        "explain": "one page about one run: state, cause, next step",
        "report": "results as table, page, Markdown, CSV and figures",
        "tensorboard": "TensorBoard over runs",
        "follow": "send metrics to Weights & Biases, or another tracker",
        "evaluate": "score checkpoints on data sets",
        "debug": "one run of a sweep in this process, under a debugger",
        "doctor": "check a Slurm cluster and write a profile for it",
        "completion": "completion of commands in bash and zsh",
        "schema": "JSON Schemas of sweeps and profiles, for editors",
    },
    "tools.commands": {
        "shards": "index, filter, verify and inspect tar shards",
        "export": "export a checkpoint to open_clip, timm, transformers or ONNX",
        "predict": "zero-shot prediction for image files",
        "tokenizer": "train or test a tokenizer",
        "prompts": "class names and templates of zero-shot data sets",
        "demo_data": "fetch and build the demonstration data",
        "study": "trainings at equal cost on the demonstration data",
        "records": "the cheapest recipes that reach a fixed accuracy",
        "slurm_sandbox": "a real Slurm on this machine",
        "audit": "known vulnerabilities of the installed packages",
    },
}
USAGE = """usage: flip COMMAND ... (flip COMMAND --help)

{commands}

every command: --quiet, --verbose, --version, --help; --json, but for completion, debug, follow, study, tensorboard
exit codes: 0 complete, 2 wrong usage, 65 data, 69 storage or network, 75 stopped, start again, 77 permission,
78 configuration (all: docs/commands.md)

examples:
  flip new mine --data data/manifest
  flip submit quickstart --dry-run
  flip status quickstart --watch
  flip report quickstart
  flip shards index --help
"""
PACKAGES = {command: package for package, commands in COMMANDS.items() for command in commands}
"""Command -> the package of its module."""


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
    if name not in PACKAGES:
        return _usage(argv)
    import importlib

    from jobs.common import cli

    if PACKAGES[name].startswith("tools."):
        if not os.path.isdir(os.path.join(ROOT, "tools", "commands")):
            print(f"flip {name} needs a checkout of the repository: run `make install` there", file=sys.stderr)
            return 78
        sys.path.insert(0, ROOT)  # an installed package of the same name must not hide tools/
    code = cli.run_main(lambda: importlib.import_module(f"{PACKAGES[name]}.{name}").main(argv[1:]))
    if name == "debug":
        from jobs.runtime.rank_process import exit_process

        exit_process(code)  # threads of torch may abort a normal exit of the interpreter
    return code


def _usage(argv: list[str]) -> int:
    """Answer a line without a command: the usage, the version, or an error with the nearest command."""
    if argv[:1] == ["--version"]:
        from jobs.common.cli import version

        print(version())
        return 0
    rows = (f"  {name:14} {text}" for commands in COMMANDS.values() for name, text in commands.items())
    usage = USAGE.format(commands="\n".join(rows))
    if argv[:1] in (["-h"], ["--help"]):
        print(usage, end="")
        return 0
    if argv:
        from flip.runs.errors import suggestion

        usage += f"\nunknown command: {argv[0]}. {suggestion(argv[0], PACKAGES)}"
    print(usage.rstrip(), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
