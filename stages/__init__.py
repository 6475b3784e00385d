"""The pipeline: a package per stage, and the packages that stages share."""
