"""Upload of an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimal_sampling.errors import ConfigError

__all__ = ["push"]


def push(folder: Path, repository: str, *, private: bool, api: Any = None) -> str:
    """Create the dataset repository where it is new, and upload the folder; its address.

    `api`: a `huggingface_hub.HfApi`. Raises ConfigError where the hub refuses, with its reason.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    try:
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=str(folder),
            commit_message=f"optimal-sampling export: {folder.name}",
            delete_patterns="data/*",
        )
    except Exception as error:  # of the hub, the network or a token: any class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{folder} is finished, but could not be uploaded to {repository}: {reason}. "
            f"Upload it with: hf upload {repository} {folder} --repo-type dataset"
        ) from error
    return f"https://huggingface.co/datasets/{repository}"
