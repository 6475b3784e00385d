"""Command line of tools.ladder."""

from tools.ladder.command import main

if __name__ == "__main__":
    main()
