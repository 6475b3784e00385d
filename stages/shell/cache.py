"""The user's cache directory for this project."""

import os
from pathlib import Path


def get_cache_directory() -> Path:
    """Return the user's cache directory for this project. Its contents may be deleted at any time."""
    import platformdirs

    return Path(os.environ.get("LM_REPRO_CACHE") or platformdirs.user_cache_path("lm-repro"))
