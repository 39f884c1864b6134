"""What may a configuration say, how is it merged, resolved, validated and hashed?

- ``schema``: the dataclasses; ``model`` and ``sizes``: the towers and their named sizes.
- ``yaml_io`` reads YAML with the place of every value; ``merge`` puts layers together and writes the result.
- ``derived``: what follows from a configuration: stages, batches, kept patches; ``sets``: lanes of several data sets.
- ``resolve`` fills in what is automatic; ``ranges`` and ``validate`` refuse what cannot work.
- ``identity``: the hash of what matters to science, and the differences between two configurations.

No torch. May import ``flip.runs``.
"""
