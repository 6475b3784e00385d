"""Command line of stage `group_texts`."""

from stages.group_texts.stage import GroupTextsConfig, main
from stages.shell.app import run

if __name__ == "__main__":
    run("group_texts", GroupTextsConfig, main)
