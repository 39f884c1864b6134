"""The record page, docs/records.md: the fewest core-seconds with which a recipe reaches a fixed accuracy.

- ``rule``: when a measured recipe has reached the goal, and how often chance alone would have it so.
- ``rows``: the measured rows, a file each in docs/records/, and the list of what did not help.
- ``measure``: trains a run of sweeps/records.yaml with new seeds and measures its cost.
- ``page``: writes the page.

May import ``lab.studies.engine`` and what that imports.
"""
