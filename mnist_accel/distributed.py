"""The process's place in the launch: its Accelerator, its threads, errors and stop signals that all ranks agree on."""

import ctypes
import functools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import accelerate.accelerator
import accelerate.optimizer
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object
from torch import Tensor

from mnist_accel.cli import SharedError, UserError, advice, counted, launched_processes
from mnist_accel.config import FIRST_PROCESS_ONLY
from mnist_accel.image_files import usable_cores

# The process group, kept until the process ends. What frees it waits for the group's threads while it holds Python's
# lock, and one of them may be waiting for that lock to free the tensors of the last exchange: of 42 finished trainings
# of two processes on a busy machine, 3 never ended (torch 2.11).
_groups: list[Any] = []


def build_accelerator(gradient_accumulation_steps: int = 1, report_to: str = "none") -> Accelerator:
    """The Accelerator for this process; a `UserError` where it would train something else than was asked for."""
    use_all_cores()
    keep_freed_memory()
    # At each step Accelerate's optimizer searches the whole import path twice for a package: a quarter millisecond.
    accelerate.optimizer.is_lomo_available = functools.cache(accelerate.optimizer.is_lomo_available)
    # `prepare` looks for tensors that are split over processes, which takes half the import time of torch once more.
    accelerate.accelerator.model_has_dtensor = lambda model: False
    for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        # On a CPU Accelerate would drop such a wish without a word.
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() in ("true", "1"):
            raise UserError(
                f"{plugin} is not supported, as a network of a megabyte gains nothing from being split up: launch "
                "with --multi_gpu, or run `accelerate config` without it"
            )
    warnings.filterwarnings("ignore", message="`log_with=.* was passed but no supported trackers")  # refused below
    # Nothing that users could mend: the stride of an image's only channel may be any, and what torch 2.11 advises for
    # a compiled network is less precise than what the launcher was asked for.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores for float32 matrix multiplication available")
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=gradient_accumulation_steps,
            log_with=None if report_to == "none" else report_to,
            project_dir=".",  # where trackers write is known, and set, once the run's folder is there
            # Gradients that live in the communication buckets save one copy a step.
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    except ValueError as error:
        # Accelerate's own refusals are about the launch: bf16 without hardware for it, an unknown tracker ...
        raise UserError(f"Accelerate cannot start so: {error}") from error
    if report_to != "none" and not accelerator.log_with:
        raise UserError(f"--report-to {report_to}: its package is not installed; install it, or use --report-to none")
    if torch.distributed.is_initialized():
        _groups.append(torch.distributed.group.WORLD)
    _check_launch(accelerator)
    return accelerator


def _check_launch(accelerator: Accelerator) -> None:
    """Refuse, or warn of, a launch in which Accelerate would train something else than the launcher was asked for."""
    asked_for = launched_processes()
    if asked_for != str(accelerator.num_processes):
        raise UserError(
            f"the launcher started {asked_for} processes but Accelerate sees {accelerator.num_processes}: each would "
            "train alone and overwrite the others; on CPU set ACCELERATE_USE_CPU=true in the launcher's environment"
        )
    command, environment = _launcher()
    # `accelerate launch` sets an address to meet at for several processes, even where it then starts one alone.
    if asked_for == "1" and command and "MASTER_PORT" in os.environ.keys() - environment:
        print(
            "warning: the launcher was asked for several processes and started one; on a CPU two take "
            "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2`",
            file=sys.stderr,
        )
    device, precision = accelerator.device.type, accelerator.mixed_precision
    supported = ["no", "bf16"] if device == "cpu" else ["no", "bf16", "fp16"]
    if precision not in supported:
        raise UserError(
            f"no mixed precision {precision} on {device}: launch with --mixed_precision {' or '.join(supported)}"
        )
    if accelerator.gradient_accumulation_steps < 1:
        raise UserError("the launcher asks for less than one gradient accumulation step: launch with 1 or more")


def use_all_cores() -> None:
    """Give this process its share of the physical cores, unless the user chose a number of threads.

    `accelerate launch` without a GPU, and torchrun with several processes, set OMP_NUM_THREADS=1, which trains on one
    core without a word. Their 1 is told from a user's by what the launcher itself was started with.
    """
    chosen = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if chosen.isdigit() and (chosen != "1" or _one_thread_was_chosen()):
        torch.set_num_threads(max(1, int(chosen)))
        return
    usable = usable_cores()
    cores = min(psutil.cpu_count(logical=False) or usable, usable)
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@functools.cache  # it is asked for at every start, about the threads and about the processes
def _launcher() -> tuple[list[str], set[str]]:
    """The command of the launcher that started this process, and the names in its environment; empty without one."""
    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent else []
        names = {part.rsplit("/", 1)[-1].split(".")[0] for part in command[:4]}
        if names & {"accelerate", "accelerate-launch", "torchrun"} or "torch.distributed.run" in command:
            return command, set(parent.environ())
    except (psutil.Error, OSError):
        return ["unknown"], set()
    return [], set()


def _one_thread_was_chosen() -> bool:
    command, environment = _launcher()
    option = any(part.replace("-", "_").startswith("__num_cpu_threads_per_process") for part in command)
    return not command or option or "OMP_NUM_THREADS" in environment


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensors instead of giving it back to the kernel.

    By default every large activation is a new mapping, and each of its pages, 3,000 a step of `mnist_net`, is a fault
    that the kernel answers with zeros: a quarter to a third of a training step on a CPU. Other C libraries are left be.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # names and numbers of glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def choose_kernels(deterministic: bool) -> None:
    """Fast kernels, or with `--deterministic` those that give the same bits every time (slower on a GPU)."""
    torch.set_flush_denormal(True)  # numbers below 1e-38 are noise and cost a CPU a hundred cycles each
    warnings.filterwarnings("ignore", message="The value of the smallest subnormal")  # NumPy before 2.4 notices
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # cuBLAS reads this when it starts; without it every matrix product would be an error.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


@contextmanager
def together() -> Iterator[None]:
    """Run a block that may fail on some ranks; then every rank raises the first failing rank's error, or none does.

    Without this a rank that fails would leave the others waiting for it in their next collective operation. Every rank
    must come here. An `OSError` (a full disk, a folder that vanished) counts as the user's to mend. What is raised on
    all ranks is a `SharedError`.
    """
    failure: UserError | OSError | None = None
    told = ""
    try:
        yield
    except (UserError, OSError) as error:
        failure = error
        told = (isinstance(error, OSError) and advice(error)) or str(error) or type(error).__name__
    messages = [text for text in gather_object([told]) if text]
    if isinstance(failure, BrokenPipeError):  # who read our output has gone: no mistake
        raise failure
    if messages:
        raise SharedError(messages[0]) from failure


def tell_other_machines(error: UserError) -> None:
    """End the other machines with the error of one that does not come to meet them: they would wait half an hour.

    Their first exchange is that of `together`. Once they have met, they notice by themselves that a process is gone.
    """
    if torch.distributed.is_initialized():
        return
    # What is known is told already; and perhaps the others never began.
    with suppress(ValueError, RuntimeError, KeyboardInterrupt):
        Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=60))])
        with together():
            raise error


def require_alike(settings: dict[str, Any]) -> None:
    """Every rank must come here with its options, by name: machines read their own command lines, files and caches.

    Raises a `SharedError` on all ranks where some have other options or other data.
    """
    first, *others = gather_object([settings])
    compared = first.keys() - FIRST_PROCESS_ONLY
    different = sorted(name for name in compared if any(other[name] != first[name] for other in others))
    if different:
        options = ", ".join(f"--{name}".replace("_", "-") for name in different)
        raise SharedError(
            f"the processes were started with different {options}: give the same options, and the same data, on every "
            "machine"
        )


def agree(accelerator: Accelerator, loss: Tensor, received_signal: int) -> tuple[float, int]:
    """The sum of a scalar `loss` over all ranks, and the highest signal number that any rank received.

    One exchange of two numbers; with a single process it is no exchange, but it does wait for the device.
    """
    if accelerator.num_processes == 1:
        return loss.item(), received_signal
    status = torch.stack([loss, torch.full_like(loss, received_signal)]).unsqueeze(0)
    losses, received = accelerator.gather(status).unbind(dim=1)
    return losses.sum().item(), int(received.max())


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a number that the training loop asks for between two steps, 0 for none.

    So nothing is torn in the middle; a second Ctrl-C stops at once. In a thread beside the main one, where Python
    allows no handlers, signals do what they did before.
    """
    received = 0

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal received
        if received == number == signal.SIGINT:
            raise KeyboardInterrupt
        received = received or number

    in_main_thread = threading.current_thread() is threading.main_thread()
    names = ("SIGTERM", "SIGINT", "SIGUSR1") if in_main_thread else ()
    handled = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has no SIGUSR1
    previous = {number: signal.signal(number, note) for number in handled}
    try:
        yield lambda: received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def describe_device(accelerator: Accelerator) -> str:
    """One line a person can check: the device, its name, the processes, the precision and the CPU threads."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else counted(torch.get_num_threads(), "thread")
    return (
        f"{device.type} ({name}), {counted(accelerator.num_processes, 'process')}, "
        f"mixed precision {accelerator.mixed_precision}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    )
