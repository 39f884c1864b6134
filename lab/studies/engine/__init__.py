"""What all studies share: how a study is trained, what its results are, and how its page is written.

- `design`: runs of a study, their cost and settings. `study`: what the engine asks of a study: a design and its page.
- `training`: measures core-seconds per sample, submits what is missing, writes a file per complete run.
- `results`: these files, the learning rates that were chosen, the runs that are missing.
- `baseline`: the nearest training picture in place of a model. `answers`: a bit per test picture.
- `intervals`: 95 % intervals over seeds and test images.
- `page`: writes the page of a study, and its figures.

It knows no study: `lab.studies` imports it, and it imports nothing of that package. Training and its results come
from the public interface (``flip``) and the files of run directories; jobs (pages, reporting) draws pages. No torch.
"""
