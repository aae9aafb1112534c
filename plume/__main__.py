"""`python -m plume`: the command `plume`."""

from plume.cli.main import main

if __name__ == "__main__":
    main()
