"""jobs/requeue.py as a batch script calls it, in this process."""

from jobs import requeue


def act(*words):
    """As ``requeue.main``, which would make this process deaf to TERM, and all that it starts."""
    return requeue.act(requeue.parser().parse_args([str(word) for word in words]))
