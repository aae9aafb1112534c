"""`plume-train --config FILE [--FIELD VALUE ...]`, `plume-train check DATA`, `plume-train merge CHECKPOINT FOLDER`."""

import sys


def main() -> None:
    """Parse, work, exit."""
    from plume_train.check import check
    from plume_train.config import SettingsError, parse_arguments
    from plume_train.lora import merge
    from plume_train.rows import RowError
    from plume_train.run import train
    from plume_train.saving import RunError

    commands = {"check": check, "merge": merge}
    try:
        if (command := commands.get(sys.argv[1] if len(sys.argv) > 1 else "")) is not None:
            sys.exit(command(sys.argv[2:]))
        train(parse_arguments(sys.argv[1:]))
    except (SettingsError, RowError, RunError, FileNotFoundError, ImportError) as error:
        sys.exit(f"plume-train: {error}")


if __name__ == "__main__":
    main()
