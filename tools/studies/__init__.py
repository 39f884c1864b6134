"""The studies in docs/study.md, docs/cheapest.md and docs/scaling_study.md, on real data and two cores.

What is compared, what does it cost, and what is the result?

- `runner`: measures core-seconds per sample, submits sweeps and reads the complete runs.
- `design`, `definitions`, `arm_scores`, `masking_page`: trainings at equal measured cost, with paired seeds: arms,
  rounds and sweeps; the two studies; differences with 95 % intervals; the pages, their figures and tables of runs.
- `scaling_design`, `scaling_runner`, `scaling_stats`, `scaling_page`: scaling of model, data and length: runs in order
  of importance and their sweep; what is missing beside the committed results; pure statistics; the page.

The command is ``flip study``. Imports flip (runs, config, monitoring) and jobs (reporting, submission), no torch.
"""
