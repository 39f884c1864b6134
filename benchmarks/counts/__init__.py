"""Counts the mechanisms of the product: what a person has to know to use it, and what a developer has to read.

    python -m benchmarks.counts                                   # a table
    python -m benchmarks.counts --json after.json
    python -m benchmarks.counts --compare before.json after.json  # Markdown: numbers, and the names that came and went

Every number is derived from the code: from the parsers of the commands, the dataclasses of settings, the table of files
of a run, and the syntax trees of all sources. `__main__` is the command. `surface` counts what users meet: commands,
options, fields, file kinds, environment variables. `code` counts statements, branches, modules and packages, `imports`
circles of imports. `answers` counts places that answer the same question: its table names them, and those that exist
count. `first_step` traces a tiny local run with `tracer`, from the submission to the first step. `rows` holds the
result, `compare` the table of two results.

Sources of `lab/` are counted in a column of their own, beside the product and with their sum.

May import flip, jobs and tools. Nothing imports it, but for tests.
"""
