"""Right and wrong answers for each test picture, in a few bytes per hundred pictures.

Records of new runs and baseline.json have them for each zero-shot set (`pack`), so that two runs can be compared on the
same pictures: `right` reads them, `is_paired` says whether two have the same pictures.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.bool_]


def pack(pictures: Sequence[int | str], right: NDArray[np.bool_]) -> dict[str, str]:
    """``right``: a bit per picture, in the order of ``images``, a digest of the pictures' names, as base64 text."""
    digest = hashlib.sha256("\n".join(map(str, pictures)).encode()).hexdigest()[:16]
    return {"images": digest, "right": base64.b64encode(np.packbits(right).tobytes()).decode("ascii")}


def right(item: Mapping[str, Any]) -> Bits | None:
    """(n,) whether each picture of a result was right; None if the result does not have it.

    Raises ValueError if the answers contradict the result.
    """
    if "right" not in item:
        return None
    bits = np.unpackbits(np.frombuffer(base64.b64decode(item["right"], validate=True), np.uint8), count=item["n"])
    if abs(float(bits.mean()) - item["top1"]) > 1e-6:
        raise ValueError(f"the answers of {item.get('name', item.get('set'))} do not have its top-1 {item['top1']}")
    return bits.astype(bool)


def is_paired(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two results are about the same pictures in the same order."""
    return "right" in first and "right" in second and first["images"] == second["images"]
