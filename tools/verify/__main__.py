"""Command line of tools.verify."""

from tools.verify.command import main

if __name__ == "__main__":
    main()
