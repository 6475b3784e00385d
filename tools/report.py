"""Write reports/report.html: experiments, loss curves, metrics, samples and data on one page that needs no network.

Command python -m tools.report [-n 3 | --all-commits | ...]

Options are those of `dvc exp show` that choose revisions; without any, they are the workspace, the last commit and the
experiments that started from it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from dvc.repo import Repo

from stages.core.artifacts import write_json
from stages.train.watchers import is_running
from tools.outs import Outs
from tools.report_data import live_runs, read_runs
from tools.report_page import render
from tools.report_pairs import plot_points, read_compared

OUT = Path("reports/report.html")
LIVE = Path("reports/train")
"""Where the live curves of trainings are."""
PLOTS = Path("reports/compare")
"""Where the differences between experiments are, a file a task, for `dvc plots`."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m tools.report", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _, options = parser.parse_known_args()
    command = ["dvc", "exp", "show", "--json", *options]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if shown.returncode:  # DVC has said why
        sys.exit("report: `dvc exp show` failed")
    revisions = json.loads(shown.stdout)
    with Repo() as repo:
        outs = Outs(repo)
        runs = read_runs(revisions, outs.read_texts)
        compared = read_compared(revisions, outs)
    live = live_runs(LIVE, is_running)
    if not live and not any(run.metrics for run in runs):
        sys.exit("report: no results yet: run `dvc repro` first")
    page = render(runs, compared, live)
    PLOTS.mkdir(parents=True, exist_ok=True)
    for task in compared:
        write_json(PLOTS / f"{task.task}.json", plot_points(task))
    aside = OUT.with_name(f".tmp-{OUT.name}")
    aside.write_text(page, encoding="utf-8")
    aside.replace(OUT)
    print(f"{OUT}: {len(runs)} runs, {OUT.stat().st_size / 1e6:.1f} MB. Open it in a browser.")


if __name__ == "__main__":
    main()
