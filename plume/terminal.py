"""What commands say: lines that cannot steer a terminal, one line for an error, warnings as sentences."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

# Controls, format controls, halves of characters, separators of lines and paragraphs, and what stands for nothing.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def is_printable(character: str) -> bool:
    """Whether a character is shown and does nothing else; spaces of all widths are.

    Example:
        >>> is_printable("\N{NARROW NO-BREAK SPACE}"), is_printable("\N{ESCAPE}"), is_printable("\N{LINE SEPARATOR}")
        (True, False, False)
    """
    return unicodedata.category(character) not in _UNPRINTABLE


def printable(text: str, keep: str = "") -> str:
    """The text with a replacement character for each that is not printable.

    Args:
        text: any.
        keep: characters that stay as they are, such as the end of a line.
    """
    return "".join(c if c in keep or is_printable(c) else "\N{REPLACEMENT CHARACTER}" for c in text)


def say(text: str, *, err: bool = False, keep: str = "") -> None:
    """Print a line, on stderr if it is not the command's result; `keep` as in `printable`."""
    print(printable(text, keep), file=sys.stderr if err else sys.stdout, flush=True)


def counted(number: int, noun: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "vector"), counted(1200, "vector")
        ('1 vector', '1,200 vectors')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def is_watched() -> bool:
    """Whether somebody follows a progress bar: stderr is a terminal."""
    return sys.stderr.isatty()


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """What to do about a name that is not known: the nearest one that is, else something else.

    Example:
        >>> did_you_mean("lerning_rate", ["learning_rate", "seed"], "see --help")
        "did you mean 'learning_rate'?"
    """
    nearest = difflib.get_close_matches(name, sorted(known), n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else otherwise


class Parser(argparse.ArgumentParser):
    """A command line without abbreviations, which says in one line what is wrong with it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self.unknown(unknown[0]))
        return known

    def unknown(self, word: str) -> str:
        """What to say of a word that is no argument."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        word = word.partition("=")[0]
        return f"unknown argument {word!r}; {did_you_mean(word, flags, f'see {self.prog} --help')}"

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: {message}", err=True)
        sys.exit(2)


def run_app(app: Any, program: str) -> None:
    """Run a typer command line called `program`, which says in one line what is wrong with it; exits."""
    from typer import Abort, BadParameter

    usage_error: Any = BadParameter.__base__
    try:
        sys.exit(app(prog_name=program, standalone_mode=False))
    except usage_error as error:
        place = error.ctx.command_path if error.ctx else ""
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stdout.write(f"{error.message}\n")
            sys.exit(2)
        what = " ".join(error.format_message().split())
        what = f"{what} See" if what.endswith("?") else f"{what.rstrip('.')}; see"
        say(f"{place}: {what} {place} --help", err=True)
        sys.exit(2)
    except ImportError as error:
        if (what := missing(error)) is None:
            raise
        say(f"{program}: {what}", err=True)
        sys.exit(1)
    except Abort:
        sys.exit(130)


#: Packages that an extra brings, and that are imported without a message of their own.
_EXTRAS = {
    "filelock": "index",
    "matplotlib": "plot",
    "datasets": "train",
    "peft": "train",
    "tensorboard": "train",
    "deepspeed": "deepspeed",
    "openai": "rationales",
    **dict.fromkeys(("fastapi", "uvicorn", "prometheus_client", "orjson"), "serve"),
}


def missing(error: ImportError) -> str | None:
    """What to install where an optional package is missing; None for another import error.

    Example:
        >>> missing(ModuleNotFoundError("No module named 'peft'", name="peft"))
        "the package peft is missing; pip install 'plume-embed[train]'"
    """
    name = (error.name or "").partition(".")[0]
    if name in _EXTRAS:
        return f"the package {name} is missing; pip install 'plume-embed[{_EXTRAS[name]}]'"
    return None if name else str(error)


@contextmanager
def plain_warnings(program: str, take: Callable[[Any], bool] = lambda warning: False) -> Iterator[None]:
    """Within it, warnings are sentences on stderr, and what libraries say of themselves stays out of the terminal.

    Args:
        program: the command, which sentences begin with.
        take: is asked first; a warning that it takes is not said.
    """

    def show(message: Any, category: Any, *args: Any, **kwargs: Any) -> None:
        if not take(message):
            say(f"{program}: warning: {' '.join(str(message).split()).removeprefix('plume: ')}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def run_script(program: str, main: Callable[[], None]) -> None:
    """Run a script as commands run: warnings are sentences, and what is wrong with a call is one line."""
    with plain_warnings(program):
        quiet_libraries()
        try:
            main()
        except (ValueError, OSError, ImportError) as error:
            what = str(error)
            if isinstance(error, ImportError) and (what := missing(error)) is None:
                raise
            sys.exit(printable(f"{program}: {' '.join(what.split())}"))


def quiet_libraries() -> None:
    """Keep progress bars of loading, and notes that ask nothing of the user, out of a command's terminal.

    `TRANSFORMERS_VERBOSITY` has its way where it is set.
    """
    import torch
    from transformers.utils import logging

    if not torch.accelerator.is_available():
        # Else DeepSpeed, which others import where it is installed, says aloud that it has found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    logging.disable_progress_bar()
