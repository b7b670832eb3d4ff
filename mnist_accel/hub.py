"""The Hugging Face Hub in bounded time, whatever it does: asked first, then downloaded from or uploaded to."""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from mnist_accel.cli import UserError

HUB_SECONDS = 6.0  # longest silence of the Hub in any one request
HUB_ATTEMPTS = 2  # how often one request is made before the Hub counts as out of reach
CACHED_SECONDS = 2.0  # how long files that are here already wait to hear of newer ones
COMMIT_SECONDS = 60.0  # longest silence while the Hub takes in an upload
WAYS_ON = {
    "model": "give a run's folder, a weights folder or another Hub id USER/NAME",
    "dataset": "use --dataset FOLDER or --dataset digits; to bring MNIST from another machine, run there "
    "`hf download ylecun/mnist --repo-type dataset --local-dir mnist`, copy the folder and use --dataset ./mnist",
}


class HubTimeout(Exception):
    """The Hub did not answer; not an OSError, so that no library takes it for something to retry."""


def reason(error: Exception) -> str:
    """The kind of an error and the first two lines of its message, in one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:2]])


@contextmanager
def _impatient_hub(seconds: float) -> Iterator[None]:
    """Let no request of huggingface_hub be silent for so long, be repeated often or be talked about in its log."""
    from huggingface_hub import constants, get_session, set_client_factory
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    requests = threading.local()
    limits = dict.fromkeys(("connect", "read", "write", "pool"), seconds)

    def limit(request: Any) -> None:
        request.extensions["timeout"] = limits
        # A download that goes on where it broke off asks for another range: that is progress, not a repetition.
        this = (request.method, request.url, request.headers.get("range"))
        requests.count = requests.count + 1 if getattr(requests, "last", None) == this else 1
        requests.last = this
        if requests.count > HUB_ATTEMPTS:
            raise HubTimeout(f"no answer to {HUB_ATTEMPTS} requests for {request.url}")

    # The client's class is httpx's or httpx2's, by the version of huggingface_hub.
    client, hooks = type(get_session()), get_session().event_hooks
    xet_before, verbosity_before = constants.HF_HUB_DISABLE_XET, logging.get_verbosity()
    hide_bars = not sys.stderr.isatty() and not are_progress_bars_disabled()
    try:
        limited = {**hooks, "request": [*hooks["request"], limit]}
        set_client_factory(lambda: client(event_hooks=limited, follow_redirects=True))
        constants.HF_HUB_DISABLE_XET = True  # Xet's own client, which the hook does not reach, has no such limits
        logging.set_verbosity_error()
        if hide_bars:
            disable_progress_bars()
        yield
    finally:
        set_client_factory(lambda: client(event_hooks=hooks, follow_redirects=True, timeout=None))
        constants.HF_HUB_DISABLE_XET = xet_before
        logging.set_verbosity(verbosity_before)
        if hide_bars:
            enable_progress_bars()


def download_files(hub_id: str, names: Sequence[str] | None = None, kind: str = "model") -> Path:
    """The local folder with these files, or all, of a repository; as cached where the Hub is out of reach.

    `kind` is "model" or "dataset". Raises a `UserError` where neither the Hub nor the cache gives all of `names`.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    fetch = partial(snapshot_download, hub_id, repo_type=kind, allow_patterns=names)
    folder, what = "", "data set" if kind == "dataset" else kind
    with suppress(Exception):
        folder = fetch(local_files_only=True)
    seconds = CACHED_SECONDS if folder else HUB_SECONDS
    try:
        with _impatient_hub(seconds), ThreadPool(1) as thread:
            # In a thread: a name server that is silent, and each of the Hub's many addresses, may take so long.
            thread.apply_async(HfApi().repo_info, [hub_id], {"repo_type": kind}).get(seconds + 1)
            folder = fetch()
        if missing := [name for name in names or () if not Path(folder, name).is_file()]:
            raise UserError(f"{hub_id} on the Hub has no {' and '.join(missing)}: {WAYS_ON[kind]}")
    except RepositoryNotFoundError as error:
        raise UserError(
            f"unknown {what} {hub_id}: no such folder, and the Hub has no such {what}, or it is private or gated: "
            "accept its terms there and log in with `hf auth login`, or choose another"
        ) from error
    except UserError:
        raise
    except Exception as error:  # of the disk, of the client and of its transport
        if not folder:
            raise UserError(
                f"no folder {hub_id}, and the {what} is not in the cache and cannot be fetched from the Hub "
                f"({reason(error)}): try again later, or {WAYS_ON[kind]}"
            ) from error
    return Path(folder)


def is_logged_in() -> bool:
    """Whether there is a token to upload with; the Hub is not asked whether it is any good."""
    from huggingface_hub import get_token

    return get_token() is not None


def upload_folder(folder: Path, hub_id: str) -> str:
    """Upload a folder as the model repository `hub_id`; returns its address, or raises a `UserError`."""
    from huggingface_hub import HfApi

    try:
        with _impatient_hub(HUB_SECONDS):
            address = HfApi().create_repo(hub_id, exist_ok=True)
        with _impatient_hub(COMMIT_SECONDS):
            HfApi().upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Upload weights")
    except Exception as error:  # of the disk, of the client and of its transport
        raise UserError(
            f"{folder} could not be uploaded to {hub_id} ({reason(error)[:200]}); it is complete on disk: log in with "
            f"`hf auth login`, then `hf upload {hub_id} {folder}`"
        ) from error
    return str(address)
