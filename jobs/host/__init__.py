"""What runs on a node outside of the container: what happens to a run when its attempt starts or ends?

- ``job.py``: ``Owner``, the process that owns a job from its first attempt to its last; the batch script executes it.
- ``job_watch.py``: what it looks at while it waits; ``job_restart.py``: how it restarts the job; ``job_nodes.py``: the
  numbers of nodes of a job; ``attempt_start.py``: whether an attempt may start, and its record; ``end_evidence.py``:
  what is known of its end.
- ``guard.py``: the process that restarts the job if its owner is killed or hangs.
- ``scheduler.py``: ``Scheduler``, what the owner needs of a scheduler, and Slurm behind it.
- ``job_processes.py``: the step of a job and the followers of trackers; ``rank_step.py``: ranks that srun starts
  without node agents.
- ``slurm_cli.py``: the only module that calls Slurm's commands and parses their output; ``node_list.py``: of nodes.
- ``own_job.py``: the batch job of this process: its number, the state in which it ends, its wall limit.
- ``requeue.py``: how a job restarts: requeue, or a successor if Slurm does not requeue it; which nodes it then avoids.
- ``failed_starts.py``: starts of a job that could not write to its run, counted in its comment.
- ``held_jobs.py``: releases and cancels the jobs that wait until the first of their kind has passed.
- ``processes.py``: processes in /proc; kills those of earlier attempts. ``sessions.py``: ranks as processes.
- ``notify.py``: the profile's notification command.
- ``rank_entry.py``: the start of a rank, before any package is imported.
- ``agents/``: the node agents of a job and their coordinator.

``job.py`` and ``rank_entry.py`` are programs: batch scripts start them by their paths, and they alone import
``agents``. Python >= 3.6, standard library only, in all files. May import ``flip.files`` and ``flip.runs``.
"""
