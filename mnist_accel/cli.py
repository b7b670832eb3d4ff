"""What every script shares: option parsing, one-line errors and exit statuses. Imports nothing heavy."""

import argparse
import atexit
import difflib
import errno
import gc
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

MODEL_HELP = (
    "a run's folder, a weights folder, a Hub id, or 'shipped' for the weights in the package (default: the newest "
    "runs/*/best, runs on digits aside, else 'shipped')"
)
DATASET_HELP = "a Hub id, a local folder, or digits (default: what the model was trained on)"

# Of `accelerate launch`; users give them to the script.
LAUNCHER_OPTIONS = {"--config-file", "--cpu", "--dynamo-backend", "--dynamo-mode", "--gpu-ids", "--machine-rank"}
LAUNCHER_OPTIONS |= {"--main-process-ip", "--main-process-port", "--mixed-precision", "--multi-gpu", "--num-machines"}
LAUNCHER_OPTIONS |= {"--num-cpu-threads-per-process", "--num-processes"}
# A process's variables for its rank and for how many there are: of torchrun, or else of a kind of mpirun.
RANK_NAMES = "RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"
SIZE_NAMES = "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"
OTHER_NAMES = {"--lr": "--learning-rate", "--bs": "--batch-size", "--num-epochs": "--epochs", "--data": "--dataset"}


class UserError(ValueError):
    """A mistake of the user's: its message is one line that says what is wrong and what to do."""


class SharedError(UserError):
    """One that all ranks raise: the first of them tells it."""


def number(kind: type, low: float, below: float = math.inf, words: Any = ()) -> Callable[[str], Any]:
    """A parser for numbers from `low` to below `below`, and for `words`, a dict of those that stand for a value."""

    def parse(text: str) -> Any:
        if text.lower() in words:
            return words[text.lower()]
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < below:
            wanted = "a whole number" if kind is int else "a number"
            wanted += f" of at least {low}" + (f" and less than {below:g}" if below < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text!r}: give {', or '.join([wanted, *words])}")
        return value

    return parse


def counted(count: int, noun: str) -> str:
    """A number and what is counted: `1 process`, `2 threads`."""
    return f"{count} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


COUNT, POSITIVE = number(int, 0), number(int, 1, 1e9)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Ends each option's help with its default, `off` for none, unless the help itself says what the default is."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Before Python 3.13 argparse itself adds a default to `--name, --no-name`.
        action.help = (action.help or "").removesuffix(" (default: %(default)s)")
        if action.required or not action.option_strings or "(default: " in action.help:
            return action.help
        if action.default is None or action.default is False:
            return f"{action.help} (default: off)"
        return super()._get_help_string(action)


class CommandLine(argparse.ArgumentParser):
    """An argument parser that takes `--batch-size` and `--batch_size` alike and never abbreviates.

    Raises a `UserError` where argparse would print its usage and exit.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args(
            [re.sub("^--[^=]+", lambda n: n[0].replace("_", "-"), a) for a in given], namespace
        )

    def error(self, message: str) -> NoReturn:
        way_on = f"see {self.prog} --help"
        if message.startswith("unrecognized arguments: --"):
            option = message.split()[2].partition("=")[0]
            if option in LAUNCHER_OPTIONS:
                own = option.replace("-", "_").replace("__", "--", 1)
                way_on = f"it is the launcher's and stands before the script: accelerate launch {own} ... {sys.argv[0]}"
            elif similar := _similar(option, self._option_string_actions):
                way_on = f"did you mean {similar}? Else {way_on}"
        raise UserError(f"{message}; {way_on}")


def _similar(option: str, known: Iterable[str]) -> str | None:
    """The option of which this one is another name, the beginning or a misspelling."""
    option = OTHER_NAMES.get(option, option)
    beginning = [name for name in known if name.startswith(option)]
    return next(iter(beginning or difflib.get_close_matches(option, known, 1, cutoff=0.7)), None)


@contextmanager
def importing() -> Iterator[None]:
    """Around imports, which make a million objects that stay: Python's collector would look at them again and again.

    Ctrl-C ends the process at once: torch's C++ modules abort where Python raises while they are imported.
    """
    interruptible = threading.current_thread() is threading.main_thread()
    interruptible &= signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()
    try:
        yield
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        gc.freeze()
        gc.enable()
        # What is still frozen when Python ends counts as leaked, and some C++ modules then list all of theirs.
        atexit.register(gc.unfreeze)


def is_first_rank() -> bool:
    """Whether this process is the one that speaks, as told by the launcher's environment."""
    return _first_set(RANK_NAMES, default="0") == "0"


def has_all_the_work() -> bool:
    """Whether this process is to do what takes seconds, and one process does, however many were launched: the first.

    From then on it counts as launched alone. Accelerate would have it meet the others, and these have gone: where one
    left in the middle of that, it failed.
    """
    if not is_first_rank():
        return False
    for name in (*RANK_NAMES, *SIZE_NAMES, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    return True


def launched_processes() -> str:
    """How many processes the launcher says that it started."""
    return _first_set(SIZE_NAMES, default="1")


def _first_set(names: Sequence[str], default: str) -> str:
    return next(filter(None, map(os.environ.get, names)), default)


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit with its status; a `UserError` becomes one line and status 2.

    That line comes from rank 0; of what happened on one machine alone, from the first rank there.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # a name may hold what the terminal cannot show
    # TensorBoard's thread keeps what befell it, a full disk say, for the next call: told here, it would be told twice.
    threading.excepthook = lambda of: None if isinstance(of.exc_value, OSError) else threading.__excepthook__(of)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # of torchrun, and of `accelerate launch` with several processes
        _end_with_launcher()
    os.environ["MPLBACKEND"] = "agg"  # a notebook exports its own, which is not installed here; nothing is shown
    try:
        status = main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except UserError as error:
        is_own = not isinstance(error, SharedError)
        status = _report(str(error), anyone=is_own and os.environ.get("LOCAL_RANK") == "0")
        if is_own and launched_processes() != os.environ.get("LOCAL_WORLD_SIZE", launched_processes()):
            from mnist_accel.distributed import tell_other_machines

            tell_other_machines(error)
    except ModuleNotFoundError as error:
        way_on = "install the project's packages, with `uv sync` or `pip install -e .`"
        status = _report(f"{error}: {way_on}", anyone=os.environ.get("LOCAL_RANK") == "0")
    except RuntimeError as error:
        status = _report(_known_cause(error), anyone=True)
    except BrokenPipeError:  # the reader of our output (`| head`) has gone
        status = 141
    except OSError as error:
        if not (told := advice(error)):
            raise
        status = _report(told)
    distributed = sys.modules.get("torch.distributed")
    # A process that fails alone ends at once: to leave the group it would wait for the others, and they for it.
    if status == 0 and distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    _end_process(status)


def _end_with_launcher() -> None:
    """Have Linux send SIGTERM when the launcher dies, killed say.

    Processes that had not met yet would wait half an hour for it, and others work on where nobody stops them.
    """
    import ctypes

    with suppress(AttributeError, OSError, TypeError):  # of other systems
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG of prctl.h


def advice(error: OSError) -> str | None:
    """What the user can do about the operating system's refusal; None where that is unknown."""
    if error.errno == errno.EACCES:
        return f"{error.strerror}: {error.filename}; give another, or ask its owner for access"
    if error.errno == errno.ENAMETOOLONG:
        return f"{error.strerror}: {error.filename}; give a shorter one"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # a full disk, a user's quota, a batch system's limit
        return f"cannot write the output: {error.strerror}; make room"
    return None


def _known_cause(error: RuntimeError) -> str:
    """What the user can do about an error of torch's that is none of the program; raises any other error."""
    name, text = type(error).__name__, str(error)  # torch is not imported here
    if name == "OutOfMemoryError" or "can't allocate memory" in text:
        asked = re.search(r"ried to allocate ([\d.]+ \w+)", text)
        of = f" for {asked[1]} more" if asked else ""
        return f"out of memory{of}: train with a smaller --batch-size, or --auto-batch-size"
    if name.startswith("Dist") or "gloo" in text:
        return (
            f"another process failed or died, or cannot be reached ({text.splitlines()[0][:200]}): start again; a "
            "training goes on from its last checkpoint with --resume auto"
        )
    raise error


def _report(message: str, anyone: bool = False) -> int:
    if anyone or is_first_rank():
        with suppress(OSError):  # where nobody reads, the status alone tells
            print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return 2


def _end_process(status: int) -> NoReturn:
    """End as multiprocessing's children do, without taking the interpreter down.

    To free a million objects one by one takes a second that nobody gains from. And a thread that exchanged gradients
    can outlive the process group: where it meets an interpreter being taken down, it aborts a process whose work was
    done, and the launcher reports a failure.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # what other threads still do is done
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # its reader has gone, or its disk is full
            stream.flush()
    os._exit(status)
