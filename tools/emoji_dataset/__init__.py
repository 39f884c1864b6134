"""The demonstration data set: emoji drawings as labelled, captioned image shards.

How is the demonstration data built, reproducibly and from open licences only?

- `download`: npm packages with the drawings, pinned by version and digest.
- `split`: classes, held-out classes and captions; a pure function of the packages.
- `render`: SVG to 64 px PNG with the same bytes on every machine; finds drawings that look alike.
- `build`: shards, manifests, class names and tokenizer in the cache folder; complete or absent.

The command is ``tools/demo_data.py``. Imports flip (runs, data.manifest, tokenizer) and
jobs.common.filesystem. Libraries that only
the build needs (PIL, resvg, webdataset) are imported inside functions.
"""
