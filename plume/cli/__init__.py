"""The command `plume`; each file has some of its subcommands. Start with `main.py`."""
