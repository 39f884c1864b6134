"""How does the documentation become a site with search?

``make docs`` builds it (``build.py``): it copies README, CONTRIBUTING and docs/ into a temporary folder, writes the
pages there that are made from the code, and calls Sphinx, for which any broken link is an error (``conf.py``). The
navigation is that of docs/index.md. ``make figures`` draws the figures of the README (``figures.py``). The generated
pages are not committed, the tables of ``restart_tables.py`` are:

- ``configuration.py``: every field of a run and of a cluster profile, from the dataclasses
- ``commands.py``: every option of every command, from the parsers
- ``json_documents.py``: the documents of ``--json``, from ``jobs.common.documents``, and the exit codes
- ``choices.py``: the implementations that a setting selects by name, from the registries
- ``metrics.py``: the fields of a metric line and their curves, from ``flip.monitoring.curves``
- ``run_directory.py``: every file of a run, from ``flip.runs.run_files``
- ``checks.py``: every check before ranks work, from ``jobs.check_list``
- ``packages.py``: every package and its question, from docstrings
- ``python_api.py``: the public Python interface, from docstrings
- ``restart_tables.py``: what follows for a job, in docs/restarts.md, from ``flip.runs.next_step``
- ``markdown.py``: tables for all of them

Everything but ``build.py`` needs the packages of `make install` alone.
"""
