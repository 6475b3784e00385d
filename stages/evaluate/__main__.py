"""Command line of stage `evaluate`."""

from stages.evaluate.stage import EvaluateConfig, main
from stages.shell.app import run

if __name__ == "__main__":
    run("evaluate", EvaluateConfig, main)
