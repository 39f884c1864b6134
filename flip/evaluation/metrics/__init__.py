"""How are answers counted, and how is a result named, stored and shown?

- ``measures``: accuracy with its interval, and published metrics of single data sets.
- ``score``: the score by which a result is shown and compared, with its name, chance level and interval.
- ``result_files``: the files of results below eval/ of a run; which of two results of a name is shown.
- ``predictions``: the prediction for each image of a zero-shot set, and its file.

A metric of its own is a function in ``measures`` with a row of ``METRICS``, and a row of ``LABELS`` in ``score``.

May import ``flip.data``, ``flip.files`` and ``flip.runs``.
"""
