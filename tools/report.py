"""Write reports/report.html, a self-contained page with experiments, loss curves, metrics, samples and data.

Command python -m tools.report [-n 3 | --all-commits | ...]

The options are those of `dvc exp show` that choose revisions. The default is the workspace, the last commit and the
experiments based on it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from dvc.repo import Repo

from stages.core.artifacts import write_json
from stages.train.watchers import is_running
from tools.ladder.result import LadderResult, read_results
from tools.outs import Outs
from tools.report_data import read_live_runs, read_runs
from tools.report_page import render_page
from tools.report_pairs import build_plot_points, read_comparisons

OUT = Path("reports/report.html")
LIVE = Path("reports/train")
"""Directory of the live curves of trainings."""
PLOTS = Path("reports/compare")
"""Directory of the differences between experiments, one file per task, for `dvc plots`."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m tools.report", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _, options = parser.parse_known_args()
    command = ["dvc", "exp", "show", "--json", *options]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:  # DVC has printed the reason
        sys.exit("report: `dvc exp show` failed")
    revisions = json.loads(process.stdout)
    with Repo() as repo:
        outs = Outs(repo)
        runs = read_runs(revisions, outs.read_texts)
        compared = read_comparisons(revisions, outs)
    live = read_live_runs(LIVE, is_running)
    if not live and not any(run.metrics for run in runs):
        sys.exit("report: no results yet: run `dvc repro` first")
    ladders = list(read_results())
    for problem in (found for found in ladders if isinstance(found, str)):
        print(f"report: a ladder is not shown: {problem}", file=sys.stderr)
    page = render_page(runs, compared, live, [found for found in ladders if isinstance(found, LadderResult)])
    PLOTS.mkdir(parents=True, exist_ok=True)
    for task in compared:
        write_json(PLOTS / f"{task.task}.json", build_plot_points(task))
    temporary_file = OUT.with_name(f".tmp-{OUT.name}")
    temporary_file.write_text(page, encoding="utf-8")
    temporary_file.replace(OUT)
    print(f"{OUT}: {len(runs)} runs, {OUT.stat().st_size / 1e6:.1f} MB. Open it in a browser.")


if __name__ == "__main__":
    main()
