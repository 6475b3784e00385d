"""Command line of stage `baseline`."""

from stages.baseline.stage import BaselineConfig, main
from stages.shell.app import run

if __name__ == "__main__":
    run("baseline", BaselineConfig, main)
