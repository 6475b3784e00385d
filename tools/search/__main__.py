"""Command line of tools.search."""

from tools.search.command import main

if __name__ == "__main__":
    main()
