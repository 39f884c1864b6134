"""Tests that a peak of memory counts what was allocated and freed since its start, and nothing from before."""

from jobs.measuring.functions.peak_memory import peak_bytes, start_peak

MEGABYTE = 1_000_000


def test_peak_counts_freed_memory_since_its_start_only():
    before = bytearray(300 * MEGABYTE)
    del before  # an earlier and higher peak
    held = bytearray(50 * MEGABYTE)
    present = start_peak()
    for megabytes in (100, 40):
        work = bytearray(megabytes * MEGABYTE)
        del work
    assert abs(peak_bytes() - present - 100 * MEGABYTE) < 8 * MEGABYTE
    assert start_peak() >= len(held)
