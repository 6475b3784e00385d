"""Command line of stage `code`."""

from stages.code.stage import CodeConfig, main
from stages.shell.app import run

if __name__ == "__main__":
    run("code", CodeConfig, main)
