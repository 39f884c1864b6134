"""What may a configuration say, how is it merged, resolved, validated and hashed?

- ``schema``: the fields with their limits, and the named model sizes. A new field is an edit of this file alone.
- ``merge`` combines layers and writes the result.
- ``derived``: quantities that follow from a configuration: stages, ranks, patches, lanes of data sets.
- ``resolve``: ``resolve_auto`` replaces ``auto`` and 0 by values for a machine and its data. ``callback_names``:
  ``monitor.callbacks``.
- ``weights``: the header of a file of weights, and whether a run can use it.
- ``validate`` refuses what cannot work. ``finish`` is the sequence of these steps, for every caller; ``loop_config``
  is the caller for loops without a run.
- ``identity``: the hash of what matters to science, and the differences between two configurations.
- ``json_schema``: the fields as JSON Schema, for editors; the documents of ``--json``, for scripts.

No torch. May import ``flip.common``, ``flip.files`` and ``flip.runs``.
"""
