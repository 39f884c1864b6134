"""Starts the supervisor of local runs: ``python -m jobs.supervisor SWEEP_DIR``. Code of 0.1 names this module."""

if __name__ == "__main__":
    from jobs.local import supervisor

    supervisor.start()
