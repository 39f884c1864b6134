"""jobs/host/batch_hooks.py as a batch script calls it, in this process."""

from jobs.host import batch_hooks


def act(*argv):
    """Run a hook like ``batch_hooks.main``, which would make this process and its children ignore TERM."""
    return batch_hooks.act(batch_hooks.parser().parse_args([str(arg) for arg in argv]))
