"""Metrics of documents, for the stages that report them."""
