"""How are bytes fetched from S3 or a disk, and what is retried?

- ``base``: the interface of a storage, its errors, and local files.
- ``s3``, ``obstore_storage``, ``fsspec_storage``: object storage. ``s3_session``: limits around its replies.
- ``ranges``: replies to ranged requests, their headers, bodies and errors.
- ``client``: ``StorageClient`` reads ranges with retries, second requests and a limit on concurrency.
- ``retry``: which errors are retried, for how long and how often; second requests; reports of outages.
- ``checksums``: CRC32 of bytes and of concatenations, ETags.

May import ``flip.files`` and ``flip.runs``.
"""
