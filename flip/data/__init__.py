"""How does S, the number of samples seen, become a batch?

- ``order``: which sample ids batch S holds, in any world; ``weighted_order``: with weights of samples; ``sources``: of
  one or several data sets.
- ``chunk_reader`` reads chunks and keeps them on the node; ``prefetch`` decides when.
- ``decode``, ``augment``, ``masking``: bytes to visible patches; ``kernel``: the same without decoding what is hidden;
  ``decode_counts``: how many images each of them decoded.
- ``sample_members``: captions, numbers, label and image of a sample.
- ``view``: images as evaluation sees them.
- ``patch_masking``: which patches stay.
- ``text_masking``: which tokens stay; ``token_table``: how often each token occurs, and its part of speech.
- ``worker`` produces the parts of batches, ``worker_pool`` runs it in processes, ``loader`` returns tensors.
- ``batches``: the loader for any training loop. ``webdataset_adapter``: the same samples, not decoded.

``flip.data.storage``, ``flip.data.parquet`` and ``flip.data.manifest`` are packages of their own below this one. May
import them, ``flip.config`` and the leaves ``rng``, ``model_costs``, ``tokenizer`` and ``concurrency``.
"""
