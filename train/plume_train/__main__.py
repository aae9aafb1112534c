"""`plume-train --config FILE [--FIELD VALUE ...]`."""

import sys


def main() -> None:
    """Parse, train, exit."""
    from plume_train.config import parse_arguments
    from plume_train.rows import RowError
    from plume_train.run import train
    from plume_train.saving import RunError

    try:
        arguments = parse_arguments(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"plume-train: {error}")
    try:
        train(arguments)
    except (RowError, RunError, FileNotFoundError) as error:
        sys.exit(f"plume-train: {error}")


if __name__ == "__main__":
    main()
