"""The process around a stage: application, terminal, signals, progress, cache. Decides no byte of an artifact."""
