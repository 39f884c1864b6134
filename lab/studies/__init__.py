"""The studies in docs/study.md, cheapest.md, head_muon.md and scaling_study.md, on real data and two cores.

What is compared, what does it cost, and what is the result?

- `engine`: a package with what all studies share: training, results, pages.
- `arms_design`, `arms_stats`, `arms`: studies of arms at equal measured cost with paired seeds, and their page.
- `masking`, `cheapest`, `head_muon`: such studies.
- `scaling`: scaling of model, data and length, with its `scaling_design`, `scaling_stats`, `scaling_tables` and
  `scaling_laws_page`.

The command is ``python -m lab.study``: every file with an object ``STUDY`` is a study. May import the public interface
(``flip``) and jobs (pages, reporting). No torch.
"""
