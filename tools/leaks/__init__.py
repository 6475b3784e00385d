"""Leak report of a trained model: `python -m tools.leaks TASK`."""
