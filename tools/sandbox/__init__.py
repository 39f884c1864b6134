"""A real Slurm on one machine, below one folder: virtual nodes with fake GPUs, for tests and for trying preemption.

How is a Slurm cluster configured, started, damaged and stopped without root and without leftovers?

- `cluster.SandboxCluster`: the public interface: start, stop, preempt, lose and return nodes, run Slurm commands.
- `config`: options, paths, ports and the text of the configuration files.
- `daemons`: munged, slurmctld, slurmd: start, shutdown, node failures, missing packages; slurmdbd and MariaDB.
- `processes`: finds the processes of the cluster in /proc; no pid is stored.

The command is ``flip slurm_sandbox``. Imports flip.runs and jobs.host.sessions; no third-party package.
"""
