"""The former place of ``flip.data.chunk_reader.ChunkReader``, kept for one release."""

from flip.data.chunk_reader import ChunkReader as Reader

__all__ = ["Reader"]
