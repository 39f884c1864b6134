"""Tests of the promises in SECURITY.md."""
