"""Starts a rank process of an evaluation: ``python -m jobs.evaluator RUN_DIR``. Records of jobs name this module."""

#: What a node agent imports before it forks ranks (``jobs.runtime.node_agent``). None of these starts a thread.
PRELOAD = ("jobs.runtime.rank_process", "flip.evaluation.evaluation_job")

if __name__ == "__main__":
    import sys

    from jobs.runtime import rank_process

    rank_process.exit_process(rank_process.main(sys.argv[1], rank_process.evaluate))
