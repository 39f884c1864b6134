"""What does a checkout offer beside the library and the launcher?

- ``commands``: the commands ``flip NAME`` of this folder, which parse options and call the packages below.
- ``shards_commands``: data sets. ``demo_datasets``: the drawings that the examples train on.
- ``sandbox``: a Slurm cluster on one machine.

May import ``flip`` and ``jobs``.
"""
