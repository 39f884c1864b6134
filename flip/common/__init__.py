"""Helpers of the library and the launcher that know no configuration, no model and no data.

- ``yaml_io`` reads YAML with the line of every value; ``option`` describes a field; ``typed`` checks the fields of a
  file: of configurations, cluster profiles and sweep files.
- ``plain_data``: nested plain data as flat keys, compared and hashed. ``cache``: the folder of cached files.
- ``image_formats``: the formats of images that are read, with their extensions and first bytes.
- ``host``: what this machine offers. ``devices``: which GPU of a node is a rank's. ``gpu_software``: the driver and
  compiler that a node with GPUs needs.
- ``user_classes``: classes in files of a user, ``FILE.py:Class``, pinned by hash, wherever a table of names exists.
- ``shutdown``: signals, the step at which all ranks agree to stop, and a watchdog for a process that hangs.

No torch when imported. May import ``flip.files`` and ``flip.runs``.
"""
