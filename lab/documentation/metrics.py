"""The page with every field of a metric line and every curve, from ``flip.monitoring.curves``."""

from flip.monitoring import curves
from lab.documentation.markdown import code, table

_HEAD = """# Metrics

The fields of a line of `metrics/<n>.jsonl`, and their curves in TensorBoard.
[monitoring.md](../monitoring.md) says how to use them. Scores have curves of their own, scores/COLUMN_top1.
"""


def metrics_page() -> str:
    """The page."""
    rows = [(code(field), tag, about) for field, (tag, about) in curves.CURVES.items()]
    rows += [(code(field), "", about) for field, about in curves.WITHOUT_CURVE.items()]
    rows += [(code(field), "below", about) for field, about in curves.NESTED.items()]
    parts = [_HEAD, table(("field", "curve", "meaning"), rows)]
    shares = [(code(part), f"system/time/{part}_share", about) for part, about in curves.TIME.items()]
    parts += ["## Shares of the time\n", table(("part of `shares`", "curve", "meaning"), shares)]
    counters = [(code(name), f"system/storage/{name}", about) for name, about in curves.STORAGE.items()]
    counters.append(("`retries_KIND`", "system/storage/retries_KIND", "Failed attempts to read, by cause."))
    about = "Sums over the ranks of one attempt; [reading.md](../reading.md#storage-errors) has the kinds of retries.\n"
    parts += ["## Counters of storage\n", about, table(("part of `storage`", "curve", "meaning"), counters)]
    return "\n".join(parts)
