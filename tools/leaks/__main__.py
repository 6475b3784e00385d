"""Command line of tools.leaks."""

from tools.leaks.command import main

if __name__ == "__main__":
    main()
