"""What does each command of the launcher parse, print and return?

One module for each command, ``flip NAME``: ``main(arguments)`` parses the words that follow the name with
``jobs.common.cli.Parser`` and gives its work to ``run_command``, which turns errors into exit codes. What a command
decides and computes is in the packages below: ``submission``, ``reporting``, ``planning``.

The table of commands is in ``jobs/__main__.py``, which also handles closed pipes, Ctrl-C and missing packages.

Modules import what is large inside functions, so that ``--help`` is quick. They may import all packages of ``jobs``.
No command imports torch, except for ``debug``, which trains in its own process.
"""
