"""Which data sets score a model, where are they, and how are their images, labels and texts read?

- ``catalog``: finds data sets by name or path, in any of the forms that are read; ``datasets.yaml`` lists the known
  ones, and ``suites.yaml`` lists of them.
- ``image_sources``: images in a fixed order, from the shards of a manifest or single files.
- ``annotations``: lists of images with labels or captions; ``associations``: those of WinoGAViL.
- ``prompts``: class names and templates.

No torch: submission looks for data sets, and compares their labels with the class names.

May import ``flip.data`` and ``flip.evaluation.metrics.measures``.
"""
