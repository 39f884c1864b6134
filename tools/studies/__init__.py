"""The studies in docs/study.md, cheapest.md, head_muon.md and scaling_study.md, on real data and two cores.

What is compared, what does it cost, and what is the result?

- `study`: what the engine asks of a study.
- `engine`: measures core-seconds per sample, submits what is missing, writes a file per complete run.
- `results`: these files, the learning rates that were chosen, the runs that are missing.
- `baseline`: the nearest training picture in place of a model. `answers`: a bit per test picture.
- `page`: writes the page of a study, and its figures.
- `arms_design`, `arms_stats`, `arms`: studies of arms at equal measured cost with paired seeds, and their page.
- `masking`, `cheapest`, `head_muon`: such studies. `scaling`: scaling of model, data and length, with its
  `scaling_design`, `scaling_stats`, `scaling_tables` and `scaling_laws_page`.

The command is ``flip study``: every file with an object ``STUDY`` is a study. Training and its results come from
the public interface (``flip``) and the files of run directories; jobs (pages, reporting) draws pages. No torch.
"""
