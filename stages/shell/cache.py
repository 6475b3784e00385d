"""The user's cache directory for this project."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """The user's cache directory for this project: what stands there may be deleted at any time."""
    import platformdirs

    return Path(os.environ.get("LM_REPRO_CACHE") or platformdirs.user_cache_path("lm-repro"))
