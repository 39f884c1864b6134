"""The former place of ``flip.data.webdataset_adapter.Samples``, kept for one release."""

from flip.data.webdataset_adapter import Samples

__all__ = ["Samples"]
