"""What runs on a node outside of the container: what happens to a run when its attempt starts or ends?

- ``batch_hooks.py``: the commands that a batch script calls: begin, end, watch and release.
- ``slurm_cli.py``: the only module that calls Slurm's commands and parses their output.
- ``own_job.py``: the batch job of this process: its number, the state in which it ends, its wall limit.
- ``requeue.py``: how a job restarts: requeue, or a successor if Slurm does not requeue it; which nodes it then avoids.
- ``failed_starts.py``: starts of a job that could not write to its run, counted in its comment.
- ``held_jobs.py``: releases and cancels the jobs that wait until the first of their kind has passed.
- ``processes.py``: processes in /proc; kills those of earlier attempts. ``sessions.py``: ranks as processes.
- ``notify.py``: the profile's notification command.
- ``coordinator.py``: ``Coordinator``, a state machine that starts and ends the attempts of a run on its node agents.
- ``agent_channel.py``: signed lines of JSON between them; ``agent_server.py``: the sockets of a coordinator.
- ``node_health.py``: ``judge`` names the nodes to exclude after the health checks of all nodes.
- ``job_coordinator.py``: the coordinator of a Slurm job, in its watcher; ``attempt_end.py``: records an attempt's end.
- ``rank_entry.py``: the start of a rank, before any package is imported; ``agent_entry.py``: of a Slurm job's agent.

Python >= 3.6, standard library only, in all files. May import ``flip.runs`` alone.
"""
