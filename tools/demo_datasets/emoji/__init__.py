"""The emoji set.

- `vendors`: its packages.
- `split`: classes, held-out classes and captions; a pure function of the packages.
- `build`: shards, class names and tokenizer.
"""
