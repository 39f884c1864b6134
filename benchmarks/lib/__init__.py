"""Helper modules of the benchmark commands in ``benchmarks/``.

The commands measure; this package holds what they share.

- Reporting: `results` (timing, machine facts, command options, result files), `table_rows` and `profiles` (the rows and
  profiles of RESULTS.md), `page_numbers` (numbers quoted in docs/).
- Data sets: `synthetic` (tables of the size of LAION-2B, without shards), `s3_datasets` (shards of
  `jobs.measuring.functions.photo_shards`, also behind an S3 server on other cores), `formats` (the same in formats of
  peers).
- Measured code: `work` (what each data pipeline does), `pipelines` (ours), `peers`, `sample_costs` (stages of ours),
  `training_steps` (a training step of open_clip; ours is in `jobs.measuring.functions`), `slurm_stub` (Slurm commands
  that answer at once).
- Method: `interleaved` runs several pipelines in turns on one core, so that all of them see the same machine;
  `steady` measures one with loader processes while its buffers are full.
- Models for benchmarks/scale.md: `fleet`, `burst`, `interruptions`, `controller`.

May import flip, jobs, tools and tests (the S3 servers), but no command of ``benchmarks/``. A peer that is not installed
is imported only inside the function that measures it.
"""
