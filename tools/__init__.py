"""What does a checkout offer beside the library and the launcher?

- ``commands``: the commands ``flip NAME`` of this folder, which parse options and call the packages below.
- ``shards_commands``: data sets. ``demo_datasets``: the drawings that examples and studies train on.
- ``studies``: what masking and other settings gain at equal cost. ``records``: the fewest core-seconds to an accuracy.
- ``sandbox``: a Slurm cluster on one machine. ``documentation``: the site.

May import ``flip`` and ``jobs``.
"""
