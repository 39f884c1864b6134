"""flip completion bash | zsh: print what a shell evaluates to complete commands, options, sweeps and runs."""

import argparse

from jobs.common.cli import Parser, run_command

EXAMPLES = """examples:
  eval "$(flip completion bash)"       in ~/.bashrc
  eval "$(flip completion zsh)"        in ~/.zshrc, after compinit
"""
SHELLS = ("bash", "zsh")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="flip completion",
        description="Print what a shell evaluates to complete commands, options, sweeps and runs.",
        epilog=EXAMPLES,
        json=False,
    )
    parser.add_argument("shell", choices=SHELLS)
    return run_command(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> int:
    import argcomplete

    print(argcomplete.shellcode(["flip"], True, args.shell))
    return 0
