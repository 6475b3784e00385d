"""Print the message and the time of a client for every fault of a Hub that the tests simulate on the loopback.

Command python benchmarks/hub_cases.py

Each client is a separate process with an empty cache: the download stage for data, and the download of a model's files
for models. Seconds are those of the whole process, imports included. The output is a Markdown table.
"""

import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hub_cases import DATA, MODELS, run_case  # noqa: E402


def main() -> None:
    print("| what | case | seconds | message |\n|---|---|---|---|")
    for kind, cases in (("data", DATA), ("model", MODELS)):
        for case in cases:
            with tempfile.TemporaryDirectory() as place:
                found = run_case(case, kind, Path(place))
            message_text = " ".join(
                re.sub(r".*?(error|StageError): ", "", found.said, count=1, flags=re.DOTALL).split()
            )
            message = message_text.replace("|", "\\|") if found.failed else "(it comes)"
            print(f"| {kind} | {case.name} | {found.seconds:.1f} | {message} |", flush=True)


if __name__ == "__main__":
    main()
