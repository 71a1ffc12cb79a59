"""The command `vas`: finds the command's module, runs it, turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import takewhile
from typing import NamedTuple, NoReturn

from vas_engine import __version__
from vas_engine.errors import VASError, nearest

OK, FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141


class Command(NamedTuple):
    """A command: where it lives, its line in the help, the extra whose packages it needs."""

    module: str
    summary: str
    extra: str | None = None


COMMANDS = {
    "demo": Command("vas_engine.commands.demo", "see the whole loop at work on a small model", "demo"),
    "collect": Command("vas_engine.commands.collect", "sample a model and score what it writes", "train"),
    "train": Command("vas_engine.commands.train", "train a value on collected samples", "train"),
    "generate": Command("vas_engine.commands.generate", "complete prompts, steered by values"),
    "evaluate": Command("vas_engine.commands.evaluate", "reward against KL, beside best-of-n", "plot"),
    "serve": Command("vas_engine.commands.serve", "OpenAI-compatible HTTP server", "serve"),
    "bench": Command("vas_engine.commands.bench", "measure speed"),
    "info": Command("vas_engine.commands.info", "versions, devices, and what a model or value is"),
}
_EXTRAS = {
    "pyarrow": "train",
    "vaderSentiment": "train",
    "matplotlib": "plot",
    "plotext": "plot",
    "opentelemetry": "otel",
}
_EPILOG = """\
examples:
  vas info
  vas generate path/to/model "Once upon a time" --max-tokens 100
  vas generate path/to/model "Once upon a time" --value kind=path/to/value --weight kind=2
  vas generate --help

exit codes: 0 done, 1 an error (one line on stderr; --traceback shows more), 2 wrong usage, 130 Ctrl-C
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vas` with these arguments (default: the process's) and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    name = next((word for word in words if not word.startswith("-")), None)
    try:
        args = _parser(name).parse_args(words, argparse.Namespace(words=words))
        if "run" not in args:
            _parser(None).print_help()
            return OK
        return args.run(args) or OK
    except KeyboardInterrupt:
        print("\nvas: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, say) has what it wants; keep the interpreter from flushing into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except VASError as error:
        if traceback:
            raise
        return _report(_one_line(error))
    except ModuleNotFoundError as error:
        extra = _extra_for(error, name)
        if traceback or extra is None:
            raise
        return _report(f"vas {name} needs {error.name}; pip install 'vas-engine[{extra}]'")
    except OSError as error:  # a folder that is a file, a full disk, no permission
        if traceback:
            raise
        return _report(_one_line(error))


def _parser(name: str | None) -> argparse.ArgumentParser:
    """The parser of one command, the others only listed: their modules are not imported."""
    parser = _Parser(
        prog="vas",
        description="Value-augmented decoding of language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vas_engine {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for known, command in COMMANDS.items():
        if known == name:
            import_module(command.module).add_parser(subparsers)
        elif _exists(command.module):
            subparsers.add_parser(known, help=command.summary, add_help=False)
    return parser


class _Parser(argparse.ArgumentParser):
    """Names the nearest command, or option of a command, in place of listing all of them or none.

    Arguments of which there may be any number (prompts) may stand behind options, too.
    """

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        words = takewhile(lambda word: word != "--", unknown)
        option = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
        if option and self.prog != "vas":
            self.error(f"unknown option {option}; {nearest(option, self._option_string_actions)}")
        several = next((action for action in self._get_positional_actions() if action.nargs == "*"), None)
        if several and not option:  # argparse takes no more of them once an option stood between
            getattr(found, several.dest).extend(word for word in unknown if word != "--")
            unknown = []
        return found, unknown

    def error(self, message: str) -> NoReturn:
        if "invalid choice" in message and self.prog == "vas":
            word = message.split("'")[1]
            message = f"unknown command {word!r}; {nearest(word, COMMANDS)}"
        super().error(message)


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _extra_for(error: ModuleNotFoundError, name: str | None) -> str | None:
    """The extra that brings the missing package; None for what ought to be there."""
    missing = (error.name or "").partition(".")[0]
    if missing == "vas_engine":
        return None
    command = COMMANDS.get(name or "")
    return _EXTRAS.get(missing) or (command.extra if command else None)


def _one_line(error: Exception) -> str:
    notes = getattr(error, "__notes__", [])
    return " | ".join([" ".join(str(error).split()), *notes])


def _report(message: str) -> int:
    print(f"vas: error: {message}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
