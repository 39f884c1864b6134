"""Commands that submit runs to a cluster, and look after them.

Each file here is a command that is typed (``python jobs/submit.py``): it parses options, calls a package below, prints
the result and turns errors into exit codes. ``worker.py``, ``evaluator.py`` and ``supervisor.py`` only start code of
``jobs.runtime`` and ``jobs.local``, because records of jobs name them.

Order of the packages; each imports only what stands to its right, and ``flip``:

    commands -> submission | reporting -> planning -> runs -> slurm | local | runtime -> sweeps | common | host

``submission`` and ``reporting`` do not import each other, nor do ``slurm``, ``local`` and ``runtime``. ``slurm``,
``local`` and ``runtime`` use ``host`` for all that also runs outside of the ranks. No command imports torch, except for
``debug``, which trains in its own process.

The host's Python >= 3.6 reads this file too.
"""
