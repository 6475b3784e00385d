"""What every stage uses: errors, configuration, artifacts, pins."""
