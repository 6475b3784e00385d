"""Modules that every stage uses: errors, configuration, artifacts, pins."""
