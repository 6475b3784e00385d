"""Stage `score`."""
