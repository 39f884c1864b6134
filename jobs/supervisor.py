"""Starts the supervisor of local runs: ``python -m jobs.supervisor SWEEP_DIR``.

The code is in ``jobs.local.supervisor``; code of an earlier release may start this module by its name.
"""

if __name__ == "__main__":
    import sys

    from flip.runs.errors import ConfigError
    from jobs.local import supervisor

    try:
        sys.exit(supervisor.main(sys.argv[1]))
    except ConfigError as error:
        sys.exit(str(error))
