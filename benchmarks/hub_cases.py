"""Meet a Hub on the loopback in every state that the tests know, and print what a client then says, and when.

Command python benchmarks/hub_cases.py

Each client is a process of its own, with a cache of its own: stage download for data, the fetching of a model's files
for models. Seconds are those of the whole process, imports included. Prints a Markdown table.
"""

import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hub_cases import DATA, MODELS, outcome  # noqa: E402


def main() -> None:
    print("| what | case | seconds | message |\n|---|---|---|---|")
    for kind, cases in (("data", DATA), ("model", MODELS)):
        for case in cases:
            with tempfile.TemporaryDirectory() as place:
                found = outcome(case, kind, Path(place))
            said = " ".join(re.sub(r".*?(error|StageError): ", "", found.said, count=1, flags=re.DOTALL).split())
            message = said.replace("|", "\\|") if found.failed else "(it comes)"
            print(f"| {kind} | {case.name} | {found.seconds:.1f} | {message} |", flush=True)


if __name__ == "__main__":
    main()
