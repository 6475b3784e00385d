"""Command line of stage `train`."""

from stages.shell.app import run
from stages.train.stage import TrainConfig, main

if __name__ == "__main__":
    run("train", TrainConfig, main)
