"""The subcommands of ``flip shards``, one file each.

What does each subcommand do, and what does it report? ``flip shards`` parses the arguments and imports the module
when the command runs. Each command is a function of the parsed options that returns an `output.CommandResult`: a report
for ``--json``, an exit code, and the text for the terminal.

- `index`: scan shards and write their manifest; `make`: write the shards, too, from a folder or table of pictures.
  `source_rows`, `image_folders` and `source_files` read these.
- `recode`: write shards again with smaller pictures; `recode_picture`: one of them.
- `move`: the manifest of shards that were copied elsewhere.
- `manifest`: ``info``, ``exclude`` and ``drop``.
- `verify`: read and decode chunks again.
- `inspect_samples`: one sample, or the samples of a training step.
- `output`: what the commands share: results, progress, errors of writing.

May import flip and the host-independent parts of jobs (common, runs). No torch at module level.
"""
