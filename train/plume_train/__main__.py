"""`plume-train --config FILE [--SETTING VALUE ...]`, and commands beside it, each with its own `--help`."""

import contextlib
import os
import re
import signal
import sys
from itertools import pairwise
from pathlib import Path

from plume.checkpoints.place import check_place, stay_offline_without_network
from plume.configurations import find_config
from plume.terminal import did_you_mean, missing, plain_warnings, printable, quiet_libraries, say

_COMMANDS = ("check", "rationales", "vectors", "mine", "gate", "merge", "soup", "accelerate")


def main() -> None:
    """Parse, work, exit."""
    words = sys.argv[1:]
    command = words[0] if words and not words[0].startswith("-") else ""
    if command and command not in _COMMANDS:
        sys.exit(printable(f"plume-train: no command {command!r}; {did_you_mean(command, _COMMANDS, 'see --help')}"))
    if not command and (not words or {"-h", "--help"} & set(words)):
        from plume_train.help import settings_help

        say(settings_help(), keep="\n")
        sys.exit(0 if words else 2)
    if command == "accelerate":
        try:
            print(find_config("accelerate", " ".join(words[1:])))  # noqa: T201
            sys.exit()
        except ValueError as error:
            sys.exit(printable(f"plume-train: {error}"))
    if words == ["--version"]:
        from plume.version import __version__

        say(f"plume-train {__version__}")
        sys.exit()

    if command != "rationales":  # whose --model is a server's
        _check_places(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with plain_warnings("plume-train"):
        quiet_libraries()
        try:
            _run(command, words[bool(command) :])
        except ImportError as error:
            if (what := missing(error)) is None:
                raise
            sys.exit(printable(f"plume-train: {what}"))


def _check_places(words: list[str]) -> None:
    """Say that there is no such model before anything is imported; look for a network where a name needs one."""
    words = [part for word in words for part in word.split("=", 1)]
    for flag, value in pairwise([*words, "--"]):
        if flag == "--model" and not value.startswith("--"):
            try:
                check_place(value)
            except ValueError as error:
                sys.exit(printable(f"plume-train: model: {error}"))
            stay_offline_without_network(value)
        elif flag == "--config":
            with contextlib.suppress(OSError, ValueError):  # said where it is read
                words += re.findall(r"[\w./-]+", find_config("train", value).read_text(encoding="utf-8"))
    for word in words:
        if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", word) and not Path(word.partition("/")[0]).exists():
            stay_offline_without_network(word)


def _run(command: str, words: list[str]) -> None:
    from plume_train.config import SettingsError, parse_arguments, settings_parser
    from plume_train.data.check import check
    from plume_train.gate import gate
    from plume_train.lora import merge
    from plume_train.mine import mine
    from plume_train.run import train_and_save
    from plume_train.saving import RunError, reason, state_of
    from plume_train.soup import soup
    from plume_train.vectors import vectors

    folder = None
    try:
        if command == "rationales":
            from plume_train.rationales.command import rationales

            sys.exit(rationales(words))
        if command:
            commands = {"check": check, "vectors": vectors, "mine": mine, "gate": gate, "merge": merge, "soup": soup}
            sys.exit(commands[command](words))
        if "--help-all" in words:
            settings_parser().print_help()
            sys.exit()
        args = parse_arguments(words)
        folder = args.output_folder
        train_and_save(args)
    except (ValueError, OSError, RunError) as error:
        # Settings are wrong in all processes alike, and one of them says it; what fails later may fail in one alone.
        is_said = isinstance(error, SettingsError) and os.environ.get("LOCAL_RANK", "0") != "0"
        sys.exit(1 if is_said else printable(f"plume-train: {reason(error)}", keep="\n"))
    except KeyboardInterrupt:
        sys.exit(f"plume-train: stopped; {state_of(folder)}")


if __name__ == "__main__":
    main()
