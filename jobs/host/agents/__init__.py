"""Which attempt starts on the nodes of a job, and when is a node agent lost?

A node agent (``jobs/runtime/node_agent.py``) starts the ranks of its node; the coordinator of the run says which.

- ``coordinator.py``: ``Coordinator``, a state machine that starts and ends the attempts of a run on its node agents.
- ``channel.py``: signed lines of JSON between them; ``server.py``: the sockets of a coordinator; ``strangers.py``:
  connections that have not shown that they are agents.
- ``contact.py``: how an agent searches for the coordinator of its job. ``probe.py`` tries that on
  a site, without a run.
- ``node_health.py``: ``judge`` names the nodes to exclude after the health checks of all nodes.
- ``node_pool.py``: ``NodePool``, the nodes of a Slurm job through their agents, for the owner of the job.
- ``entry.py``: the task of a Slurm job that starts the agent of its node, and starts it again if it is killed.
- ``orphaned_task.py``: restarts a job from a task if its first node is lost, or all of its batch script was killed.

On one machine the supervisor has the coordinator (``jobs/local/agents.py``). Python >= 3.6, standard library only, in
all files. May import ``jobs.host``, ``flip.files`` and ``flip.runs``.
"""
