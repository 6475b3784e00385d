"""Stage `code`: the modules of stages/ -> hashes of the modules that each stage imports.

Reads   stages/
Writes  code/STAGE.json, for train one file per framework: module to the hash of its behavior
Command python -m stages.code
"""

import logging

from stages.core.artifacts import write_directory, write_json
from stages.core.config import config_view
from stages.core.source_code import hash_code, list_root_modules, list_stages

log = logging.getLogger(__name__)


@config_view
class CodeConfig:
    out: str
    """Directory to write."""


def main(config: CodeConfig) -> None:
    names = [name for stage in list_stages() for name in list_root_modules(stage)]
    modules: set[str] = set()
    # Expect only one of the files: an earlier version of the directory may have been written with other stages.
    with write_directory(config.out, [f"{names[0]}.json"]) as directory:
        for name in names:
            hashes = hash_code(name)
            write_json(directory / f"{name}.json", hashes)
            modules |= hashes.keys()
    log.info("%d modules of %d stages -> %s", len(modules), len(list_stages()), config.out)
