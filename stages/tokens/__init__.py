"""Tokenizers and their vocabulary, for every stage that reads tokens."""
