"""What does each command beside the launcher parse, print and return?

One module for each command, ``flip NAME``, as in ``jobs.commands``: data (``shards``, ``tokenizer``, ``prompts``,
``demo_data``), trained models (``export``, ``predict``) and ``slurm_sandbox``. Larger ones have their code in a package
of ``tools``: ``shards_commands``, ``demo_datasets``, ``sandbox``.

The table of commands is in ``jobs/__main__.py``.
"""
