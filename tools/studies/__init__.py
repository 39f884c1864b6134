"""The studies in docs/study.md and docs/cheapest.md: trainings at equal measured cost, with paired seeds.

What is compared, what does it cost, and what is the result?

- `design`: arms, rounds and the sweeps that train them; arithmetic without files. `definitions`: the two studies.
- `runner`: measures core-seconds per sample, submits the sweeps of each round and reads the complete runs.
- `paired_stats`: chosen learning rates, and paired differences with 95 % intervals.
- `masking_page`: writes the page of a study, its figures and the table of runs.

The command is ``tools/study.py``. Imports flip (runs, config, monitoring) and jobs (reporting, submission), no torch.
"""
