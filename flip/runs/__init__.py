"""Where do the files of a run lie, which state is it in, what is a complete checkpoint, which exit code has a failure?

- ``rundir``: names and formats of the files of a run directory, and the only ways to write them.
- ``run_files``: a table of these files and what each holds. ``side_jobs``: jobs beside the runs of a sweep.
- ``checkpoint_folder``: the protocol of checkpoints, retention, and pins that protect a checkpoint for another run.
- ``command_record``: command.json of a run that executes a program, and the records of its checkpoints.
- ``records``: the fields and types of every record, checked when it is read.
- ``metric_lines``: the only reader of metrics/<n>.jsonl.
- ``origin``: whether a run directory was copied, or renamed and moved.
- ``remote_owner``: which remote folders of checkpoints a run directory may delete in. ``addresses``: schemes of URLs.
- ``credentials``: what is removed from texts that leave the process, and refused in settings.
- ``attempts``: records of attempts. ``end_attempt`` calls the restart policy and writes its decision.
- ``restart_policy``: ``decide``, a pure function: causes of an end -> restart, stop, or wait.
- ``next_step``: the only function that decides what follows: a restart in the allocation or by a requeue, or none.
- ``lifecycle``: ``state_of``, a pure function: what files prove and what a scheduler shows -> the state of a run.
- ``canary``: which run goes ahead of others, and when these are released.
- ``bad_nodes``: nodes that the next attempts of a run exclude.
- ``wall_limit``: the time limit of a job, compared with the measured times of its run.
- ``cgroup``: memory of the host and of its cgroups, and what their limits have stopped.
- ``node_address``: the address of a name on this node.
- ``temporary_folders``: who owns a temporary folder, and the only cleaner of those that killed processes leave.
- ``checks``: the row of all checks before ranks work, and lists of rules.
- ``errors``: the errors that users see, with their causes and exit codes.

Trainer, launcher and the host's batch script share these modules: standard library only, Python >= 3.6. Imports
``flip.files`` alone.
"""
