"""How are bytes fetched from S3 or a disk, and what is retried?

- ``base``: the interface of a storage, faults and local files; ``s3``, ``obstore_storage``, ``fsspec_storage``.
- ``client``: ``StorageClient`` reads ranges with retries, second requests and a limit on concurrency.
- ``retry``: which fault is retried, how long and how often; ``hedge``: second requests; ``outage``: what users see.
- ``checksums``: CRC32 of parts and of their concatenation; ``etag``; ``counters``.

May import ``flip.runs``.
"""
