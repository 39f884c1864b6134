"""Starts a rank process of a run: ``python -m jobs.worker RUN_DIR``. Records of jobs name this module."""

if __name__ == "__main__":
    import sys

    from jobs.runtime import rank_process

    rank_process.exit_process(rank_process.main(sys.argv[1]))
