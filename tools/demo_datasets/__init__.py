"""The demonstration data sets: drawings as captioned image shards, from open licences only.

How are they built, reproducibly, from pinned npm packages?

- `npm`: packages, pinned by version and digest.
- `render`: SVG to 64 px PNG with the same bytes on every machine; finds drawings that look alike.
- `output`: shards, manifests and done.json in the cache folder; complete or absent.
- `emoji/`: about 10,000 drawings by nine vendors, with Unicode's names.

The command is ``flip demo_data``. Sets of others, as the icons of the scaling study, use ``npm``, ``render`` and
``output``. Imports flip (runs, rng, data.manifest, tokenizer) and jobs.common.
Libraries that only the build needs (PIL, resvg, webdataset, pyarrow) are imported inside functions.
"""
