"""Whether the library can be used here. With ``--require`` the exit code is 1 if not."""

import sys

from visible_jpeg import unavailable

reason = unavailable()
print(f"kernel: no, because {reason}" if reason else "kernel: yes")
sys.exit(bool(reason) and "--require" in sys.argv)
