"""Brings Stable Diffusion 3 from the hub, and says what to do when the hub refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from percov2.messages import one_line

_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


def local_copy(model: str, folders: Sequence[str]) -> Path:
    """A directory with the folders of a model in diffusers' layout.

    Args:
        model: such a directory, which is returned, or a hub id (``owner/name``, or
            ``owner/name@revision`` of a branch, tag or commit); that is fetched, or found in the
            hub's cache. The half-precision duplicates of some repositories are left out.
        folders: for instance ``transformer``; a tokenizer's too.

    Raises:
        ValueError: a folder is missing, or the hub gives no access; says what to do.
    """
    if Path(model).is_dir():
        missing = [folder for folder in folders if not (Path(model) / folder).is_dir()]
        if missing:
            raise ValueError(
                f"{model} has no folder {', '.join(missing)}: give a complete model in diffusers' "
                "layout"
            )
        return Path(model)
    repository, _, revision = model.partition("@")
    try:
        for folder in folders:
            if not folder.startswith("tokenizer"):
                # One small file first: what may go wrong shows before gigabytes are fetched.
                hf_hub_download(repository, f"{folder}/config.json", revision=revision or None)
        patterns = [f"{folder}/{files}" for folder in folders for files in _FILES]
        snapshot = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=patterns,
            ignore_patterns=["*fp16*"],
        )
    except (
        EntryNotFoundError,
        HTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        raise ValueError(_explain(error, repository, revision)) from error
    return Path(snapshot)


def _explain(error: Exception, model: str, revision: str) -> str:
    """One line: what the hub's answer means and what to do."""
    page = f"https://huggingface.co/{model}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    login = "log in here with `hf auth login` or set HF_TOKEN"
    # The order matters: a gated repository is also a repository not found, and so on.
    if isinstance(error, HFValidationError):
        return f"{model!r} is neither a directory nor a hub id (owner/name)"
    if isinstance(error, GatedRepoError):
        if status == 401:
            return f"{model} is gated: accept its licence on {page}, then {login}"
        return (
            f"{model} is gated and this account has no access: accept its licence on {page} with "
            "the account that HF_TOKEN or `hf auth login` belongs to"
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no public repository {model}: check the name; if it is private, {login}"
    if isinstance(error, RevisionNotFoundError):
        return f"{model} has no revision {revision!r}: see {page}/tree/main"
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"{model} is not in the local cache and the hub cannot be reached: check the network "
            "and HF_HUB_OFFLINE, or give a local directory"
        )
    if isinstance(error, EntryNotFoundError):
        return (
            f"{model} is not in diffusers' layout (its files: {page}/tree/main): for SD3-medium "
            "take stabilityai/stable-diffusion-3-medium-diffusers"
        )
    if status == 401:
        return f"the hub refuses the token for {model}: {login} anew"
    return f"cannot fetch {model} ({one_line(error)}): try again later"
