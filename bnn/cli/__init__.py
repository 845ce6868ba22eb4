"""The command line: one file a verb. Nothing here imports torch before a verb runs."""

from __future__ import annotations

import sys
import traceback
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer

from bnn.cli import bank, bench, calibrate, compare, demo, evaluate, fit, predict, train
from bnn.cli.ranks import VOICE, on_ranks
from bnn.errors import BankWriteError, BnnError, RankLost

app = typer.Typer(
    name="bnn",
    help="Fit a posterior over the weights of a module, keep it as a bank of samples, use and judge it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("fit")(fit.fit)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("calibrate")(calibrate.calibrate)
app.command("predict")(predict.predict)
app.add_typer(bank.app, name="bank")
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a negative verdict, 2 bad input, 3 input or output failed, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.showwarning = say_warning
    sys.exit(run(arguments))


# typer brings its own copy of click in some versions: this is the base of its usage errors in all of them.
_UsageError: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def run(arguments: list[str]) -> int:
    """Run the command line; the exit code. Errors are one line on stderr, with `--debug` a traceback before it."""
    try:
        with on_ranks(arguments):
            code = app(arguments, prog_name="bnn", standalone_mode=False)
        return _interrupted(arguments) if code == 130 else code if isinstance(code, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted(arguments)
    except BnnError as error:
        _debug(arguments)
        from bnn.cli.show import plain

        return _say(plain(str(error)), 3 if isinstance(error, BankWriteError | RankLost) else 2)
    except OSError as error:
        _debug(arguments)
        return _say(f"{error.filename or 'input/output'}: {error.strerror or error}", 3)
    except MemoryError:
        _debug(arguments)
        return _say("out of memory: use a smaller model, fewer chains or smaller batches", 2)
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "bnn"
        message = error.format_message()
        if not message.strip() or type(error).__name__ == "NoArgsIsHelpError":  # the help itself
            return _say(message or f"{command}: a command is missing; see '{command} --help'", 2)
        return _say(f"{command}: {message.rstrip('.')}; see '{command} --help'", 2)
    except Exception as error:  # not foreseen: still one line, and the traceback for whoever asks
        _debug(arguments)
        lines = str(error).strip().splitlines()
        return _say(f"{type(error).__name__}: {lines[0] if lines else ''}; say --debug to see where", 2)


def say_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one line on stderr, without the place in the code that people cannot act on."""
    _say(f"warning: {message}", 0)


def _interrupted(arguments: list[str]) -> int:
    """What to say after Ctrl-C: how to go on where something was committed."""
    out = next((word for flag, word in pairwise(arguments) if flag == "--out"), "bnn-demo")
    out = next((word.partition("=")[2] for word in arguments if word.startswith("--out=")), out)
    kept = any(Path(out).glob("bank.json")) or (arguments[:1] == ["demo"] and any(Path(out).glob("*/bank.json")))
    if arguments[:1] in (["fit"], ["train"], ["demo"]) and kept:
        return _say("interrupted; what was committed is kept, go on with the same command and --resume", 130)
    return _say("interrupted; nothing was left behind", 130)


def _say(message: str, code: int) -> int:
    if not VOICE.silent:
        print(f"{VOICE.prefix}{message}", file=sys.stderr)  # noqa: T201
    return code


def _debug(arguments: list[str]) -> None:
    if "--debug" in arguments:
        traceback.print_exc()
