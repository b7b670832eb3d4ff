"""The Hugging Face Hub in bounded time, whatever it does: asked first, then downloaded from or uploaded to."""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mnist_accel.cli import UserError

HUB_SECONDS = 6.0  # longest silence of the Hub in any one request
HUB_ATTEMPTS = 2  # how often one request is made before the Hub counts as out of reach
CACHED_SECONDS = 2.0  # how long files that are here already wait to hear of newer ones
COMMIT_SECONDS = 60.0  # longest silence while the Hub takes in an upload


class HubTimeout(Exception):
    """The Hub did not answer; not an OSError, so that no library takes it for something to retry."""


def reason(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def probe_hub(kind: str, hub_id: str, way_on: str, seconds: float | None = None) -> str:
    """Why the Hub is out of reach, or nothing if it knows this repository.

    Args:
        kind: "dataset" or "model".
        hub_id: `USER/NAME`.
        way_on: what to do instead, for the message.
        seconds: to wait for its answer; `HUB_SECONDS` if not given.

    Raises:
        UserError: it does not know it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    seconds = HUB_SECONDS if seconds is None else seconds
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().repo_info(hub_id, repo_type=kind, timeout=seconds)
            answer.append(None)
        except Exception as error:
            answer.append(error)

    # In a thread, because nothing else bounds a name server that does not answer.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    error = answer[0] if answer else HubTimeout(f"no answer within {seconds:.0f} seconds")
    if isinstance(error, GatedRepoError):
        raise UserError(f"{hub_id} is gated: accept its terms on the Hub and log in with `hf auth login`") from error
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        what = "data set" if kind == "dataset" else kind
        raise UserError(
            f"unknown {what} {hub_id}: no such folder, and the Hub has no such {what} (or it is private: log in with "
            f"`hf auth login`); {way_on}"
        ) from error
    return reason(error) if error else ""


@contextmanager
def impatient_hub(seconds: float | None = None) -> Iterator[None]:
    """Let no request of huggingface_hub wait long, be repeated often or talk about it; `HUB_SECONDS` if not given."""
    from huggingface_hub import constants, get_session, set_client_factory
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    requests = threading.local()
    limits = dict.fromkeys(("connect", "read", "write", "pool"), HUB_SECONDS if seconds is None else seconds)

    def limit(request: Any) -> None:
        request.extensions["timeout"] = limits
        # A download that goes on where it broke off asks for another range: that is progress, not a repetition.
        this = (request.method, request.url, request.headers.get("range"))
        requests.count = requests.count + 1 if getattr(requests, "last", None) == this else 1
        requests.last = this
        if requests.count > HUB_ATTEMPTS:
            raise HubTimeout(f"no answer to {HUB_ATTEMPTS} requests for {request.url}")

    # The client's class is httpx's or httpx2's, by the version of huggingface_hub.
    client = type(get_session())
    hooks = get_session().event_hooks
    limited = {**hooks, "request": [*hooks["request"], limit]}
    xet_before, verbosity_before = constants.HF_HUB_DISABLE_XET, logging.get_verbosity()
    hide_bars = not sys.stderr.isatty() and not are_progress_bars_disabled()
    set_client_factory(lambda: client(event_hooks=limited, follow_redirects=True))
    # Xet's own client, which the hook does not reach, has no such limits.
    constants.HF_HUB_DISABLE_XET = True
    logging.set_verbosity_error()
    if hide_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        set_client_factory(lambda: client(event_hooks=hooks, follow_redirects=True, timeout=None))
        constants.HF_HUB_DISABLE_XET = xet_before
        logging.set_verbosity(verbosity_before)
        if hide_bars:
            enable_progress_bars()


def download_files(hub_id: str, names: Sequence[str]) -> Path:
    """The local folder with these files of a model repository; as they are in the cache where the Hub is out of reach.

    Raises:
        UserError: there is no such repository or file, or the Hub is out of reach and the cache does not have them.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    trouble = ""
    try:
        cached = all(isinstance(try_to_load_from_cache(hub_id, name), str) for name in names)
        way_on = "give a run's folder, a weights folder or a Hub id USER/NAME"
        trouble = probe_hub("model", hub_id, way_on, CACHED_SECONDS if cached else None)
        with impatient_hub():
            files = [hf_hub_download(hub_id, name, local_files_only=bool(trouble)) for name in names]
    except UserError:
        raise
    except RemoteEntryNotFoundError as error:
        raise UserError(f"{hub_id} on the Hub has no {' and '.join(names)}: choose another model") from error
    except Exception as error:  # of the disk, of the client and of its transport
        raise UserError(
            f"no folder {hub_id}, and the Hub gives no such model: {trouble or reason(error)}; try again later, or "
            "give a run's or a weights folder"
        ) from error
    return Path(files[0]).parent


def upload_folder(folder: Path, hub_id: str) -> str:
    """Upload a folder as the model repository `hub_id`, made if need be; returns its address.

    Raises:
        UserError: the Hub refuses or is out of reach.
    """
    from huggingface_hub import HfApi

    try:
        with impatient_hub():
            address = HfApi().create_repo(hub_id, exist_ok=True)
        with impatient_hub(COMMIT_SECONDS):
            HfApi().upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Upload weights")
    except Exception as error:  # of the disk, of the client and of its transport
        raise UserError(
            f"{folder} could not be uploaded to {hub_id} ({reason(error)[:200]}); it is complete on disk: log in with "
            f"`hf auth login`, then `hf upload {hub_id} {folder}`"
        ) from error
    return str(address)
