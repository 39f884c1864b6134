"""What runs on a node outside of the container: what happens to a run when its attempt starts or ends?

- ``batch_hooks.py``: the commands that a batch script calls: begin, end, watch and release.
- ``slurm_cli.py``: the only module that calls Slurm's commands and parses their output; ``node_list.py``: of nodes.
- ``own_job.py``: the batch job of this process: its number, the state in which it ends, its wall limit.
- ``requeue.py``: how a job restarts: requeue, or a successor if Slurm does not requeue it; which nodes it then avoids.
- ``failed_starts.py``: starts of a job that could not write to its run, counted in its comment.
- ``held_jobs.py``: releases and cancels the jobs that wait until the first of their kind has passed.
- ``processes.py``: processes in /proc; kills those of earlier attempts. ``sessions.py``: ranks as processes.
- ``lost_step.py``: ends an srun that outlives its ranks.
- ``memory_kills.py``: how many processes of this cgroup the kernel has killed for memory.
- ``notify.py``: the profile's notification command.
- ``attempt_end.py``: records an attempt's end.
- ``rank_entry.py``: the start of a rank, before any package is imported.
- ``agents/``: the node agents of a job and their coordinator.

``batch_hooks.py`` and ``rank_entry.py`` are programs: batch scripts start them by their paths, and they alone import
``agents``. Python >= 3.6, standard library only, in all files. May import ``flip.files`` and ``flip.runs``.
"""
