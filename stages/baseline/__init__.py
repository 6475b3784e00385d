"""Stage `baseline`."""
