"""The page with every option of every command. The Sphinx extension sphinx-argparse-cli reads them from the parsers."""

from jobs.__main__ import PACKAGES

_HEAD = """# Commands and options

Every command, from its parser, as `flip COMMAND --help` shows it.
[commands.md](../commands.md) lists everyday tasks.
"""
_DIRECTIVE = """
.. sphinx_argparse_cli::
   :module: {package}.{name}
   :func: main
   :hook:
   :title: flip {name}
   :group_title_prefix:
"""
"""``hook``: the parser is that which ``main`` asks to parse its arguments; the command is not executed."""


def commands_page() -> str:
    """The page."""
    directives = "".join(_DIRECTIVE.format(package=package, name=name) for name, package in PACKAGES.items())
    return f"{_HEAD}\n```{{eval-rst}}{directives}```\n"
