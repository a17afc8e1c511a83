"""A Hub in memory, in place of the calls of huggingface_hub that reach the network."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitInfo, HfApi, RepoUrl
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError


# huggingface_hub 2 uses httpx2 and 1 used httpx; either may be installed for other packages too.
HTTP = importlib.import_module(HTTPError.__module__.partition(".")[0])


class FakeHub:
    """Repositories by name: the bytes of each file; those of a branch under `name@branch`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: list[dict[str, Any]] = []
        self.is_down = False

    def create_repo(self, repo_id: str, **options: Any) -> RepoUrl:
        repo_id = repo_id if "/" in repo_id else f"user/{repo_id}"
        self.repositories.setdefault(repo_id, {})
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_branch(self, repo_id: str, branch: str, **options: Any) -> None:
        self.repositories.setdefault(f"{repo_id}@{branch}", dict(self.repositories[repo_id]))

    def create_commit(
        self, repo_id: str, operations: Sequence[Any], commit_message: str, revision: str | None = None, **options: Any
    ) -> CommitInfo:
        assert commit_message  # as the real one
        for operation in operations:
            with operation.as_file() as file:
                self.files(repo_id, revision)[operation.path_in_repo] = file.read()
        options |= {"commit_message": commit_message, "revision": revision}
        self.commits.append(options)
        return CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/1",
            commit_message=commit_message,
            commit_description="",
            oid="1",
        )

    def files(self, repo_id: str, revision: str | None) -> dict[str, bytes]:
        return self.repositories[repo_id if revision is None else f"{repo_id}@{revision}"]

    def download(self, repo_id: str, filename: str, revision: str | None = None, **options: Any) -> str:
        if self.is_down:
            raise LocalEntryNotFoundError("The Hub did not answer in time.")
        if filename not in self.files(repo_id, revision):
            response = HTTP.Response(404, request=HTTP.Request("HEAD", f"https://huggingface.co/{repo_id}"))
            raise RemoteEntryNotFoundError(filename, response=response)
        path = self.folder / filename
        path.write_bytes(self.files(repo_id, revision)[filename])
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
    monkeypatch.setattr(HfApi, "create_branch", lambda api, *args, **options: hub.create_branch(*args, **options))
    monkeypatch.setattr(HfApi, "hf_hub_download", lambda api, *args, **options: hub.download(*args, **options))
    return hub
