"""Models, objectives, losses, masking and numerical precision."""
