"""Which drawings does the scaling study train on, and how is their set built?

- `families`: its package, which sets are used, which sets are one design, and which designs are held out.
- `names`: captions from names, aliases and categories.
- `drawings`: renders the sets; an interrupted build continues.
- `selection`: drops copies and near-duplicates; chooses subsets, classes, retrieval and probe sets.
- `build`: shards, class names, tokenizer and licences.

The command is ``python -m lab.icons``. Packages, pixels and shards are those of ``tools.demo_datasets``.
"""
