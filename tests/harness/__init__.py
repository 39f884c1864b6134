"""Test harness: builders that set up real runs, clusters and command lines for tests.

Each builder creates its files below one folder, starts what the test needs, and offers methods to act on it and to wait
for states. The assertions are in the tests.

- `training_run.TrainingRun`: one real training run under the local supervisor; kills ranks and damages files.
- `local_sweep.LocalSweep`: a sweep of fake rank processes under the real local supervisor.
- `command_line`: the commands of jobs/ as a user types them, on a local or a Slurm sweep with real data.
- `user_command_line.UserCommandLine`: the same as another user of the machine.
- `slurm_scene.SlurmScene`: one submission to a real Slurm, and a record of states, signals and calls.
- `simulated_scene.SimulatedScene`: the same scenarios on the simulated Slurm of `tests.fakeslurm`.
- `storm_site.StormSite`: Slurm, S3 server, proxies and sweep for `tests.storm`.
- `foreign_storm_site.ForeignStormSite`: the same on a Slurm of another form.
- `quota.Quota`: an exceeded quota, for processes that load its C library.
- `common`: waiting, running a command, creating a run directory.

May import flip, jobs, tools and the helper modules of tests (synthetic data, S3 servers, users, the simulated Slurm).
Test files and conftest.py import the harness, not the other way round.
"""
