"""Stage `group_texts`."""
