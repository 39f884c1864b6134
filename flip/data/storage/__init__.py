"""How are bytes fetched from S3 or a disk, and what is retried?

- ``base``: the interface of a storage, its errors, and local files.
- ``storages``: which client reads an address: the table ``STORAGES``.
- ``s3``, ``obstore_storage``, ``http_storage``, ``fsspec_storage``: the clients.
- ``s3_session``: limits around the replies of S3.
- ``ranges``: replies to ranged requests, their headers, bodies and errors.
- ``client``: ``StorageClient`` reads ranges with retries, second requests and a limit on concurrency.
- ``retry``: which errors are retried, for how long and how often; second requests; reports of outages.
- ``checksums``: CRC32 of bytes and of concatenations, ETags.

May import ``flip.files`` and ``flip.runs``.
"""
