"""The subcommands of ``flip shards``, one file each.

What does each subcommand do, and what does it report? ``flip shards`` parses the arguments and imports the module
when the command runs. Each command is a function of the parsed options that returns an `output.CommandResult`: a report
for ``--json``, an exit code, and the text for the terminal.

- `index`: scan shards and write their manifest; `make`: write the shards, too, from images. `sources` opens what the
  user names: `source_rows` and `image_folders` read folders and tables, `parquet_source` and `parquet_files` parquet
  files, all as rows (`source_row`), and `source_files` the files that rows name. `other_formats` refuses the others.
  `shard_writer` writes a part of the rows, `source_images` checks their images.
- `parquet_folders`: folders of parquet files that `index` reads in place.
- `recode`: write shards again with smaller images; `recode_image`: one of them.
- `move`: the manifest of shards that were copied elsewhere.
- `weights`: the file of weights of a manifest's samples.
- `manifest`: ``info``, ``exclude`` and ``drop``.
- `verify`: read and decode chunks again.
- `inspect_samples`: one sample, or the samples of a training step.
- `output`: what the commands share: results, progress, errors of writing.

May import flip and the host-independent parts of jobs (common, runs). No torch at module level.
"""
