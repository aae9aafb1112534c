"""`plume-train --config FILE [--FIELD VALUE ...]`, `plume-train check DATA`, `plume-train merge CHECKPOINT FOLDER`."""

import signal
import sys


def main() -> None:
    """Parse, work, exit."""
    from plume.terminal import printable
    from plume_train.config import parse_arguments
    from plume_train.data.check import check
    from plume_train.lora import merge
    from plume_train.run import train
    from plume_train.saving import RunError, reason, state_of

    commands = {"check": check, "merge": merge}
    folder = None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if (command := commands.get(sys.argv[1] if len(sys.argv) > 1 else "")) is not None:
            sys.exit(command(sys.argv[2:]))
        args = parse_arguments(sys.argv[1:])
        folder = args.output_folder
        train(args)
    except (ValueError, OSError, RunError, ImportError) as error:
        sys.exit(printable(f"plume-train: {reason(error)}", keep="\n"))
    except KeyboardInterrupt:
        sys.exit(f"plume-train: stopped; {state_of(folder)}")


if __name__ == "__main__":
    main()
