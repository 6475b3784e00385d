"""Command line of stage `score`."""

from stages.score.stage import ScoreConfig, main
from stages.shell.app import run

if __name__ == "__main__":
    run("score", ScoreConfig, main)
