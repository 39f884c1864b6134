"""Follows runs for experiment trackers, outside of the ranks.

- ``tracker.py``: ``Tracker``, the interface, ``TRACKERS``, the table of trackers, and the start of a follower process.
- ``wandb_tracker.py``: Weights & Biases.
- ``follower.py``: ``Follower`` sends the metric lines of a run to a tracker, each step once.

A new tracker is one file, one row of ``TRACKERS``, and one field of ``Monitor`` in ``flip/config/schema.py``. Loads no
torch. May import ``jobs.common``.
"""
