"""The Hugging Face Hub, asked first whether it answers, then downloaded from or uploaded to."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from mnist_accel.cli import UserError

HUB_SECONDS = 6.0  # how long the Hub may take to say that it is there
CACHED_SECONDS = 2.0  # the same where its files are here already, and only newer ones are asked for
UPLOAD_SECONDS = 180.0  # how long an upload may take: weights have a few megabytes
WAYS_ON = {
    "model": "give a run's folder, a weights folder or another Hub id USER/NAME",
    "dataset": "use --dataset FOLDER or --dataset digits; to bring MNIST from another machine, run there "
    "`hf download ylecun/mnist --repo-type dataset --local-dir mnist`, copy the folder and use --dataset ./mnist",
}


def reason(error: Exception) -> str:
    """The kind of an error and the first two lines of its message, in one; links to general help aside."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("For more info")]
    return ": ".join([type(error).__name__, *lines[:2]])


def _show_progress_to_people_only() -> None:
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


def _within(seconds: float, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call returns; a `TimeoutError` after so many seconds, while the call goes on in its thread.

    The Hub's client has limits for single requests only, and tries several addresses, each several times.
    """
    with ThreadPool(1) as thread:
        return thread.apply_async(call, args, kwargs).get(seconds)


def download_files(hub_id: str, names: Sequence[str] | None = None, kind: str = "model") -> Path:
    """The local folder with those of these files, or of all, that a repository has; as cached where the Hub is away.

    `kind` is "model" or "dataset". Raises a `UserError` where neither the Hub nor the cache has the repository.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    _show_progress_to_people_only()
    fetch = partial(snapshot_download, hub_id, repo_type=kind, allow_patterns=names)
    folder, what = "", "data set" if kind == "dataset" else kind
    with suppress(Exception):
        folder = fetch(local_files_only=True)
    try:
        _within(CACHED_SECONDS if folder else HUB_SECONDS, HfApi().repo_info, hub_id, repo_type=kind)
        folder = fetch()
    except RepositoryNotFoundError as error:
        raise UserError(
            f"unknown {what} {hub_id}: no such folder, and the Hub has no such {what}, or it is private or gated: "
            "accept its terms there and log in with `hf auth login`, or choose another"
        ) from error
    except Exception as error:  # of the disk, of the client and of its transport
        if not folder:
            raise UserError(
                f"no folder {hub_id}, and the {what} is not in the cache and cannot be fetched from the Hub "
                f"({reason(error)}): try again later, or {WAYS_ON[kind]}"
            ) from error
    return Path(folder)


def upload_folder(folder: Path, hub_id: str) -> str:
    """Upload a folder as the model repository `hub_id`; returns its address, or raises a `UserError`."""
    from huggingface_hub import HfApi

    _show_progress_to_people_only()
    try:
        address = _within(HUB_SECONDS, HfApi().create_repo, hub_id, exist_ok=True)
        _within(
            UPLOAD_SECONDS, HfApi().upload_folder, repo_id=hub_id, folder_path=folder, commit_message="Upload weights"
        )
    except Exception as error:  # of the disk, of the client and of its transport
        raise UserError(
            f"{folder} could not be uploaded to {hub_id} ({reason(error)[:200]}); it is complete on disk: log in with "
            f"`hf auth login`, then `hf upload {hub_id} {folder}`"
        ) from error
    return str(address)
