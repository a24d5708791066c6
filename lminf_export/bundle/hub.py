"""Bundles on the Hugging Face hub: fetched into its cache, and pushed."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.hub_errors import hub_errors_as, transport_error
from lminf_export.bundle.manifest import read_manifest
from lminf_export.bundle.records import MANIFEST_NAME
from lminf_export.disk import require_path
from lminf_export.errors import BundleError, shown

logger = logging.getLogger(__name__)

# "organisation/name", or a file of that repository behind it.
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(.+))?", re.ASCII)


def find_bundle(
    path: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Return where a bundle is on this machine; one of the hub is fetched first.

    Args:
        path: a folder, or a file in one; text such as "org/name" or "org/name/engine.plan" that
            names neither is a repository of the hub.
        revision: branch, tag or commit of the hub.
        cache_dir: where the hub's files are kept.

    Raises:
        BundleError: no such folder, and the hub has no such bundle, or cannot be reached.
    """
    require_path("path", path, BundleError)
    if cache_dir is not None:
        require_path("cache_dir", cache_dir, BundleError)
    if not isinstance(revision, str | None):
        raise BundleError(f"revision={shown(revision)}: must be a branch, a tag or a commit")
    match = _HUB_NAME.fullmatch(path) if isinstance(path, str) else None
    if match is None or os.path.lexists(path):
        if revision is not None:
            raise BundleError(
                f"revision {shown(revision)} is for bundles of the hub; {path} is local"
            )
        return Path(path)
    folder = _fetch(match[1], revision, cache_dir)
    return folder / match[2] if match[2] else folder


def names_hub(path: str | Path) -> bool:
    """Return whether a text names a bundle of the hub, and nothing that is on this machine."""
    return isinstance(path, str) and bool(_HUB_NAME.fullmatch(path)) and not os.path.lexists(path)


def push_to_hub(
    bundle: str | Path | Bundle,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Put a bundle into a repository of the hub, in one commit; every file is hashed first.

    Args:
        bundle: its folder, or the opened bundle.
        repo_id: such as "org/name"; made if it is not there.
        private: of a repository that is made; None leaves it to the hub.
        revision: branch to commit to, made if it is not there; None for the main one.
        message: of the commit.
        token: of the hub; by default the one of `hf auth login`.

    Returns:
        The commit's address.

    Raises:
        BundleError: the bundle is damaged, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if _HUB_NAME.fullmatch(repo_id) is None or repo_id.count("/") != 1:
        raise BundleError(f"{repo_id!r} is not the id of a repository, such as org/name")
    opened = Bundle.open(bundle.path if isinstance(bundle, Bundle) else bundle, "full")
    names = [*opened.manifest.files, MANIFEST_NAME]
    api = HfApi(library_name="lminf-export", token=token)
    with hub_errors_as(BundleError, repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, str(opened.path / name)) for name in names],
            commit_message=message or f"Add a bundle of {opened.manifest.source.name}",
            revision=revision,
        )
    return str(done.commit_url)


def _fetch(repo_id: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    """Fetch the files that the manifest names, of one commit, and no others."""
    from huggingface_hub import hf_hub_download, snapshot_download

    no_bundle = (
        f"holds no bundle: it has no {MANIFEST_NAME}; a model of transformers is exported first: "
        f"lminf-export --model {repo_id} --out DIR"
    )
    with hub_errors_as(BundleError, repo_id, revision, lacks=no_bundle):
        offline = not _answers(repo_id, revision)
        found = hf_hub_download(
            repo_id,
            MANIFEST_NAME,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=offline,
        )
        text = Path(found).read_bytes()
        manifest = read_manifest(text, f"{MANIFEST_NAME} of {repo_id}")
        # The commit is the name of the folder in the cache.
        folder = snapshot_download(
            repo_id,
            revision=Path(found).parent.name,
            cache_dir=cache_dir,
            local_files_only=offline,
            allow_patterns=[_literal(name) for name in (*manifest.files, MANIFEST_NAME)],
        )
    return Path(folder)


def _answers(repo_id: str, revision: str | None) -> bool:
    """Return whether the hub can be asked about a revision of a repository now.

    It is asked once, so that a misspelt folder is not tried for half a minute.
    """
    from huggingface_hub import HfApi, errors

    try:
        HfApi(library_name="lminf-export").model_info(repo_id, revision=revision)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except (errors.OfflineModeIsEnabled, transport_error(), OSError) as error:
        logger.info("the hub cannot be asked about %s: %s", repo_id, error)
        return False
    return True


def _literal(name: str) -> str:
    """Return a pattern that matches one name."""
    return re.sub(r"([*?[])", r"[\1]", name)
