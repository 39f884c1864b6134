"""jobs/host/batch_hooks.py as a batch script calls it, in this process."""

from jobs.host import batch_hooks


def act(*words):
    """As ``batch_hooks.main``, which would make this process deaf to TERM, and all that it starts."""
    return batch_hooks.act(batch_hooks.parser().parse_args([str(word) for word in words]))
