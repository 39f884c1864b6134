"""The language of sweep files: from a file to its runs.

- ``sweep_file.py``: ``read_sweep`` reads a file, its recipes and the overrides of the command line. ``Sweep``
  has the ``Run`` list; a run has a name, a configuration, and its differences from other runs.
- ``command_file.py``: ``load`` reads a file with ``command``, and ``beside`` the ``commands`` of others.
- ``expansion.py``: ``runs``, ``grid``, ``zip`` and ``list`` -> points with names.
- ``constraints.py``: the conditions of ``where``, which select points.
- ``json_schemas.py``: the JSON Schemas that ``flip schema`` writes for editors.
- ``published.py``: rows of the paper's tables (sweeps/published/paper.yaml), and which run reproduces which row.

Reads files and writes nothing. Errors name the file and the line. May import ``flip.config`` and
``jobs.common``, and reads no run directory.
"""
