"""A Hub in memory, in place of the calls of huggingface_hub that reach the network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitInfo, HfApi, RepoUrl
from huggingface_hub.errors import LocalEntryNotFoundError


class FakeHub:
    """Repositories by name: the bytes of each file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: list[dict[str, Any]] = []

    def create_repo(self, repo_id: str, **options: Any) -> RepoUrl:
        repo_id = repo_id if "/" in repo_id else f"user/{repo_id}"
        self.repositories.setdefault(repo_id, {})
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id: str, operations: Sequence[Any], **options: Any) -> CommitInfo:
        for operation in operations:
            with operation.as_file() as file:
                self.repositories[repo_id][operation.path_in_repo] = file.read()
        self.commits.append(options)
        return CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/1",
            commit_message=options["commit_message"],
            commit_description="",
            oid="1",
        )

    def download(self, repo_id: str, filename: str, **options: Any) -> str:
        if filename not in self.repositories.get(repo_id, {}):
            raise LocalEntryNotFoundError(filename)
        path = self.folder / filename
        path.write_bytes(self.repositories[repo_id][filename])
        return str(path)

    def write(self, repo_id: str, folder: Path) -> Path:
        """Write the files of a repository to `<folder>/<repo_id>`."""
        for name, content in self.repositories[repo_id].items():
            path = folder / repo_id / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder / repo_id


def make_fake_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """Put a fake Hub in place of the real one."""
    hub = FakeHub(folder)
    monkeypatch.setattr(HfApi, "create_repo", lambda api, *args, **options: hub.create_repo(*args, **options))
    monkeypatch.setattr(HfApi, "create_commit", lambda api, *args, **options: hub.create_commit(*args, **options))
    monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", hub.download)
    return hub
