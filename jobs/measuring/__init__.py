"""How fast is this machine, does the toolkit work on it, and what breaks?

`flip doctor --measure` runs rows (``rows.py``), each in processes of its own and with a limit of its own
(``limited.py``), so that a failure of one leaves the others. The code of the rows, which needs torch, is in
``functions``. ``machine.py`` collects facts and runs the rows; ``verdicts.py`` says what works, what is slow and why,
and what to do; ``page.py`` shows it as HTML, Markdown and text; ``compare.py`` puts two results side by side.
``command.py`` is the command. The file of the result is ``jobs.planning.measurement``, because plans read it.

With a profile of Slurm, ``cluster.py`` submits a job, ``node.py`` is the work of each of its nodes, which meet in a
folder (``rendezvous.py``) and whose results become one.

`make bench-gpu` runs its rows in the same way, and shares the code of a step.

May import ``jobs.reporting`` and everything below it, but not torch.
"""
