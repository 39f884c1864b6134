"""What does a rank of a job execute, and with which cause and exit code does it end?

- ``rank_process.py``: ``main`` prepares the process (signals, logs, checks of snapshot and identity), then trains, or
  runs ``evaluate``; in any case it writes the rank's cause and returns the exit code. ``in_process`` trains in the
  calling process, for ``flip debug``.
- ``node_agent.py``: one process per node that forks the ranks of each attempt and reports their ends to a coordinator.
  ``forked_rank.py``: what makes a fork a rank. ``cpu_shares.py`` divides the CPUs of the node between them.
- ``command_process.py``: ``execute`` is the work of a rank that executes a program. ``program.py``: its process,
  started by ``program_start.py``; ``program_checkpoints.py`` and ``program_metrics.py`` follow what it writes, and
  ``program_evaluation.py`` reads the scores of its evaluation.
- ``health.py``: a process that checks the GPUs, memory and disks of a node before it works; ``network_check.py``: one
  that measures the network with those of the other nodes. Both are a ``CheckProcess`` of ``check_process.py``.

``jobs/worker.py``, ``jobs/evaluator.py`` and ``jobs/commander.py`` start it as ``python -m jobs.worker RUN_DIR``.

The only package of ``jobs`` that imports ``flip.training.trainer``, and so torch; it does so inside functions, after
signal handlers are installed. May import ``jobs.host``.
"""
