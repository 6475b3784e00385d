"""Search for better values under a budget: `python -m tools.search`."""
