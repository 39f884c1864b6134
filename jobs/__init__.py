"""Commands that submit runs to a cluster, and look after them.

``__main__.py`` is the program ``flip``: it has the table of commands and starts a module of ``commands`` or of
``tools.commands``, which parses options, calls a package below, prints the result and turns errors into exit codes.
``submit.py`` is ``flip submit`` as a script. ``worker.py``, ``evaluator.py``, ``commander.py`` and ``follow.py`` only
start code of packages below, because records of jobs and batch scripts name them. ``check_list.py`` joins the lists of
checks before ranks work.

Order of the packages; each imports only what stands to its right, and ``flip``:

    commands -> measuring.functions -> measuring -> submission | reporting -> workloads -> planning
        -> submitted_runs -> backends -> slurm | local | runtime | sweeps -> tracking | pages -> common -> host

``workloads`` alone knows what a run does: a training or a program of a sweep, or an evaluation.

``submission`` and ``reporting`` do not import each other, nor do ``slurm``, ``local`` and ``runtime``. ``slurm``,
``local`` and ``runtime`` use ``host`` for all that also runs outside of the ranks. No command imports torch, except for
``debug``, which trains in its own process.

The host's Python >= 3.6 reads this file too.
"""
