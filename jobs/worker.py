"""Starts the worker of a run: ``python -m jobs.worker RUN_DIR``.

The code is in ``jobs.runtime.worker``. Records of jobs name this module, so that runs start whose snapshot is
older or newer than the launcher, whatever the layout of its packages.
"""

if __name__ == "__main__":
    import sys

    from jobs.runtime import worker

    worker.exit_process(worker.main(sys.argv[1]))
