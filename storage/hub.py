"""Pushing a version to the Hugging Face hub as a dataset: its card, its manifest and its Parquet files."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from storage.errors import ExtraError, HubError
from storage.lake import DatasetRef, FileEntry, Lake
from storage.manifest import FILE_NAME
from storage.publish import CARD_NAME
from storage.schema import TABLES
from storage.stream import CHUNK_BYTES, HashingReader

PUSHED_KINDS = ("prompts", "candidates", "preferences")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a version goes; the token comes from where huggingface_hub looks for it (HF_TOKEN, `hf auth login`)."""

    name: str
    private: bool = False
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was uploaded, and where it is now."""

    url: str
    commit: str
    files: list[str]


# Uploads a folder: (folder, target, commit message) -> (address, commit).
Upload = Callable[[Path, Target, str], tuple[str, str]]


def push(lake: Lake, ref: DatasetRef, target: Target, upload: Upload | None = None) -> Pushed:
    """Copy the files of a published version, each checked against the manifest, and upload them as one commit."""
    if ref.kind not in PUSHED_KINDS:
        raise HubError(f"{ref} is of kind {ref.kind}; push takes {', '.join(PUSHED_KINDS)}")
    if upload is None:
        if find_spec("huggingface_hub") is None:
            raise ExtraError("push needs huggingface_hub, which is not installed; run: pip install 'winnow[hub]'")
        upload = upload_to_hub
    shards = [file for file in lake.manifest(ref).files if file.table is not None]
    with tempfile.TemporaryDirectory(prefix="winnow-push-") as name:
        folder = Path(name)
        for plain in (CARD_NAME, FILE_NAME):
            (folder / plain).write_bytes(lake.store.read(f"{ref.prefix}/{plain}"))
        for file in shards:
            _copy(lake, ref, file, folder / file.path)
        url, commit = upload(folder, target, str(ref))
    return Pushed(url, commit, sorted([CARD_NAME, FILE_NAME, *(file.path for file in shards)]))


def upload_to_hub(folder: Path, target: Target, message: str) -> tuple[str, str]:
    """One commit that also removes shards of an earlier version; the dataset and the branch are made if needed."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # The base of all errors of the HTTP library, whichever one this huggingface_hub uses.
    http_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    api = HfApi(library_name="winnow")
    try:
        # None leaves it to the account's own default; a dataset that is there keeps what it has.
        repo = api.create_repo(target.name, repo_type="dataset", private=target.private or None, exist_ok=True)
        if target.private and not api.repo_info(repo.repo_id, repo_type="dataset").private:
            raise HubError(f'"{repo.repo_id}" is public already; make it private there, or push without --private')
        if target.revision is not None:
            api.create_branch(repo.repo_id, branch=target.revision, repo_type="dataset", exist_ok=True)
        done = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            repo_type="dataset",
            revision=target.revision,
            commit_message=message,
            delete_patterns=[f"{table}/*.parquet" for table in TABLES],
        )
    # ValueError is how a malformed name, token or card is refused.
    except (http_error, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        fix = "check the name, the network and your token (HF_TOKEN or `hf auth login`)"
        raise HubError(f'"{target.name}" cannot be pushed to: {reason}; {fix}') from error
    return str(repo), str(done.oid)


def _copy(lake: Lake, ref: DatasetRef, file: FileEntry, path: Path) -> None:
    """One file, which must be what the manifest lists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with lake.store.open(f"{ref.prefix}/{file.path}") as stored, path.open("wb") as copy:
        reader = HashingReader(stored)
        shutil.copyfileobj(reader, copy, CHUNK_BYTES)
    if reader.sha256 != file.sha256:
        raise HubError(f"{ref}: {file.path} is not what the manifest lists; see `winnow verify {ref}`")
