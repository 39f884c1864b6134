"""A pseudo-terminal of a given size, and the visible part of the output that a program writes to it."""

import fcntl
import os
import re
import signal
import struct
import subprocess
import termios
import threading

CONTROL = re.compile(r"\x1b\[(\?)?([0-9;]*)([A-Za-z])|\x1b.|[\r\n\x07\x08]", re.DOTALL)


class Terminal:
    """``file`` is a stream to the terminal. ``raw``: all output. ``scrolled``: lines that left the screen at its top.
    The terminal accepts the control sequences that the product may use, and rejects others."""

    def __init__(self, columns=80, lines=24):
        self.raw = b""
        self.master, slave = os.openpty()
        self.resize(columns, lines)
        self.file = os.fdopen(slave, "w", encoding="utf-8", buffering=1)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def resize(self, columns, lines):
        self.columns = columns
        self.lines = lines
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def start(self, *arguments, **options):
        """Start a process with this terminal as standard input, output, error and controlling terminal.

        Ctrl-C reaches the process even if the tests run in the background, where processes ignore SIGINT.
        """
        options.setdefault("env", dict(os.environ))  # readline, which pytest loads, sets COLUMNS behind Python's back
        return subprocess.Popen(
            arguments, stdin=self.file, stdout=self.file, stderr=self.file, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
        )  # fmt: skip

    def _read(self):
        while True:
            try:
                data = os.read(self.master, 1 << 16)
            except OSError:  # the other end was closed
                return
            if not data:
                return
            self.raw += data

    def close(self):
        """Wait for the rest of the output. Afterwards no output is allowed."""
        if not self.file.closed:
            self.file.close()
        self._reader.join()
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()  # the next terminal may get the number of this file
        os.close(self.master)

    def text(self):
        """Return the lines that have scrolled away and the visible text.

        Set ``cursor`` (it is visible) and ``wrapped`` (a line was longer than the terminal).
        """
        self.cursor = True
        self.wrapped = False
        self.scrolled = []
        self.grid = [[]]
        self.x = 0
        self.y = 0
        text = self.raw.decode()
        offset = 0
        for match in CONTROL.finditer(text):
            self._write(text[offset : match.start()])
            self._control(match)
            offset = match.end()
        self._write(text[offset:])
        return "\n".join("".join(line).rstrip() for line in (*self.scrolled, *self.grid)).rstrip("\n")

    def _write(self, text):
        for letter in text:
            assert letter.isprintable(), f"{letter!r} reached the terminal"
            if self.x == self.columns:
                self._newline()
                self.x = 0
                self.wrapped = True
            line = self.grid[self.y]
            line += " " * (self.x + 1 - len(line))
            line[self.x] = letter
            self.x += 1

    def _newline(self):
        self.y += 1
        if self.y == len(self.grid):
            self.grid.append([])
        if len(self.grid) > self.lines:
            self.scrolled.append(self.grid.pop(0))
            self.y -= 1

    def _control(self, match):
        private, numbers, kind = match.groups()
        first = int(numbers.split(";")[0] or 0) if numbers else 0
        if match[0] == "\r":
            self.x = 0
        elif match[0] == "\n":
            self._newline()
        elif private and kind in "hl" and first == 25:
            self.cursor = kind == "h"
        elif private or kind is None:
            raise AssertionError(f"{match[0]!r} reached the terminal")
        elif kind == "A":
            self.y = max(0, self.y - max(1, first))
        elif kind == "K" and first == 2:
            self.grid[self.y].clear()
        elif kind == "H":
            self.x = self.y = 0
        elif kind == "J":
            self.grid[:] = [[]]
            self.y = 0
        else:
            assert kind == "m", f"{match[0]!r} reached the terminal"


def golden(path, text):
    """Compare a text with its golden file. FLIP_GOLDEN=write writes the file."""
    if os.environ.get("FLIP_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    assert text + "\n" == path.read_text(encoding="utf-8"), "FLIP_GOLDEN=write writes the new text; read the difference"
