"""The language of sweep files: which runs does a file mean?

- ``sweep_file.py``: ``load`` reads a file, its recipes and the settings typed on top of it. ``Sweep`` has the ``Run``
  list; a run has a name, a configuration and where it differs from the others.
- ``expansion.py``: ``runs``, ``grid``, ``zip`` and ``list`` -> points with names.
- ``constraints.py``: the conditions of ``where``, which leave points out.
- ``published.py``: rows of the paper's tables (sweeps/paper.yaml), and which run stands for which.

Reads files of the repository and writes nothing. Errors name the file and the line. May import ``flip.config`` and
``jobs.common``, and reads no run directory.
"""
