"""Starts the process of a node that is measured: ``python -m jobs.measurer RUN_DIR``. Jobs name this module."""

#: What a node agent imports before it forks ranks (``jobs.runtime.node_agent``). None of these starts a thread.
PRELOAD = ("jobs.runtime.rank_process", "jobs.measuring.node")

if __name__ == "__main__":
    import sys

    from jobs.measuring import node
    from jobs.runtime import rank_process

    rank_process.exit_process(rank_process.main(sys.argv[1], node.measure_node))
