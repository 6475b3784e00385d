"""Stage `download`."""
