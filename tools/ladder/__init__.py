"""Scaling ladder: `python -m tools.ladder FILE`."""
