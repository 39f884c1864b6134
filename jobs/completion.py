"""flip completion bash | zsh: print what a shell evaluates to complete commands, options, sweeps and runs."""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: jobs/ must not be on the path, where tensorboard.py hides the package
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[1])]

from jobs.common.cli import Parser, quietly, run_command

EXAMPLES = """examples:
  eval "$(flip completion bash)"       in ~/.bashrc
  eval "$(flip completion zsh)"        in ~/.zshrc, after compinit
"""
SHELLS = ("bash", "zsh")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        description="Print what a shell evaluates to complete commands, options, sweeps and runs.",
        epilog=EXAMPLES,
        json=False,
    )
    parser.add_argument("shell", choices=SHELLS)
    return run_command(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> int:
    from flip.runs.errors import ConfigError

    try:
        import argcomplete
    except ModuleNotFoundError:
        remedy = "Install it: pip install 'argcomplete>=3.3,<4'"
        raise ConfigError("completion needs the package argcomplete", remedy=remedy) from None
    print(argcomplete.shellcode(["flip"], True, args.shell))
    return 0


if __name__ == "__main__":
    sys.exit(quietly(main))
