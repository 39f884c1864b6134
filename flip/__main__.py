"""``python -m flip``: names the program. The package is the library, and does not import the launcher."""

import sys

sys.stderr.write(f"This package is a library. Its commands: flip COMMAND, or {sys.executable} -m jobs COMMAND\n")
sys.exit(2)
