"""Writing to the Hugging Face hub."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from epd_ray.errors import TableError, shown
from epd_ray.weights.hub import HUB_FAILURES, first_line

_FIX = "have a write token: run `hf auth login`, set HF_TOKEN, or pass token="


def upload(repo_id: str, folder: Path, *, token: str | None, private: bool, commit_message: str) -> str:
    """Put the files of a folder into a repository of the hub, which is made where it does not exist.

    Args:
        repo_id: "owner/name".
        folder: whose files are uploaded.
        token: with permission to write; None means the one that `hf auth login` stored.
        private: whether a new repository is private.
        commit_message: of the upload.

    Returns:
        The repository's address.

    Raises:
        TableError: no token, no permission, or no connection.
    """
    if token is None and huggingface_hub.get_token() is None:
        raise TableError(f"{shown(repo_id)} cannot be written: no token here ({_FIX})")
    api = huggingface_hub.HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=commit_message)
    except HUB_FAILURES as error:
        said = first_line(error)
        if isinstance(error, HFValidationError):
            raise TableError(f"{said} (a hub id is 'owner/name')") from error
        fix = " (is the hub reachable from here?)"
        if isinstance(error, HfHubHTTPError):
            rights = {401: f" ({_FIX})", 403: f" (use an owner that you may write to, and {_FIX})"}
            fix = rights.get(error.response.status_code, "")
        raise TableError(f"{shown(repo_id)} cannot be written: {said}{fix}") from error
    return str(address)
