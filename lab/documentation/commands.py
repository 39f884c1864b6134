"""The page with every option of every command. The Sphinx extension sphinx-argparse-cli reads them from the parsers."""

from jobs.__main__ import PACKAGES

LAB = {"study": "lab.study", "records": "lab.records.__main__", "icons": "lab.icons.__main__", "audit": "lab.audit"}
"""Program ``python -m lab.NAME`` of the development of FLIP itself -> its module."""
_HEAD = """# Commands and options

Every command, from its parser, as `flip COMMAND --help` shows it. The last are programs of a checkout.
[commands.md](../commands.md) lists everyday tasks.
"""
_DIRECTIVE = """
.. sphinx_argparse_cli::
   :module: {module}
   :func: main
   :hook:
   :title: {title}
   :group_title_prefix:
"""
"""``hook``: the parser is that which ``main`` asks to parse its arguments; the command is not executed."""


def commands_page() -> str:
    """The page."""
    modules = {f"flip {name}": f"{package}.{name}" for name, package in PACKAGES.items()}
    modules |= {f"python -m lab.{name}": module for name, module in LAB.items()}
    directives = "".join(_DIRECTIVE.format(title=title, module=module) for title, module in modules.items())
    return f"{_HEAD}\n```{{eval-rst}}{directives}```\n"
