"""Command line of stage `download`."""

from stages.download.stage import DownloadConfig, main
from stages.shell.app import run

if __name__ == "__main__":
    run("download", DownloadConfig, main)
