"""Sends the metrics of an attempt: ``python -m jobs.follow RUN_DIR``. Batch scripts of queued jobs name this module."""

if __name__ == "__main__":
    import sys

    from jobs.__main__ import main

    sys.exit(main(["follow", *sys.argv[1:]]))
