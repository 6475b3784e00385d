"""Stage `code`: the modules of stages/ -> for each stage, hashes of those that it imports.

Reads   stages/
Writes  code/STAGE.json, for train one for each framework: module to the hash of what it does
Command python -m stages.code
"""

import logging

from stages.core.artifacts import staged, write_json
from stages.core.config import part
from stages.core.source_code import hash_code, hashed_names, list_stages

log = logging.getLogger(__name__)


@part
class CodeConfig:
    out: str
    """Directory to write."""


def main(config: CodeConfig) -> None:
    names = [name for stage in list_stages() for name in hashed_names(stage)]
    modules: set[str] = set()
    # Of the files, one is expected: the others were different ones before a stage was added.
    with staged(config.out, [f"{names[0]}.json"]) as directory:
        for name in names:
            hashes = hash_code(name)
            write_json(directory / f"{name}.json", hashes)
            modules |= hashes.keys()
    log.info("%d modules of %d stages -> %s", len(modules), len(list_stages()), config.out)
