"""Starts a rank of a program: ``python -m jobs.commander RUN_DIR``. Records of jobs name this module."""

#: What a node agent imports before it forks ranks (``jobs.runtime.node_agent``). None of these starts a thread.
PRELOAD = ("jobs.runtime.rank_process", "jobs.runtime.command_process")

if __name__ == "__main__":
    import sys

    from jobs.runtime import command_process, rank_process

    rank_process.exit_process(rank_process.main(sys.argv[1], command_process.execute))
