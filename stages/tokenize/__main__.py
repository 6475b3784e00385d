"""Command line of stage `tokenize`."""

from stages.shell.app import run
from stages.tokenize.stage import TokenizeConfig, main

if __name__ == "__main__":
    run("tokenize", TokenizeConfig, main)
