"""The Hugging Face Hub: its client, and the pinned files of checkpoints and tokenizers."""
