"""Verification of a commit by replay: `python -m tools.verify`."""
