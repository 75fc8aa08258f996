"""Measurements: `nox -s bench`, or `python -m tests.bench NAME ...`. Never part of the tests."""
