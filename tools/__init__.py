"""Commands that are not stages: nothing that they do is cached or tracked by DVC."""
