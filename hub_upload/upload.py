"""Pushes an exported folder to the Hub. Without --push it only says what it would do.

Either way the folder is verified first: a card with a number that has no source file beside it is refused.

python hub_upload/upload.py FOLDER user/name --push

The only file of the package that writes to the network. The token is huggingface_hub's (`hf auth login` or HF_TOKEN).
"""

import os
import re
import sys
from pathlib import Path

from nanollada.hub_upload.card_results import with_source
from nanollada.hub_upload.verify import REPO_ID, VerificationError, check_files, verify
from nanollada.trainers.commands.ending import run_program

TWIN = re.compile(r"\]\(\.\./(?=[\w.-]+\))")  # the card's link to a folder beside this one
# Of a training checkpoint, not of a model; pickles besides.
REFUSED = ("*.bin", "*.pt", "*.pth", "*.pkl")
# Left from an earlier upload with other shards, they would be loaded in place of the new ones.
STALE = ["*.safetensors", "*.safetensors.index.json"]


def files_to_upload(folder: Path) -> list[Path]:
    """
    The files of an export, without hidden and cached ones.

    Raises:
        `ValueError`: if the folder is no export, or holds what must not be uploaded.
    """
    check_files(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = {path: path.relative_to(folder).parts for path in files}
    files = [path for path in files if not any(part.startswith(".") or part == "__pycache__" for part in parts[path])]
    refused = [path.name for path in files if any(path.match(pattern) for pattern in REFUSED)]
    if refused:
        raise ValueError(f"`folder` must be an export, not a training checkpoint, got {', '.join(refused)} in it")
    return files


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    push: bool = False,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    base_model: str | os.PathLike | None = None,
) -> str | None:
    """
    Verifies an exported folder, lists what goes where, and with `push` creates the repository and uploads.

    Args:
        folder (`str` or `os.PathLike`): As `export` makes it. With `push`, its card's `repo_id` is set to the target,
            and so are the address of evaluation.json in its `model-index` and the owner of its twin.
        repo_id (`str`): "user/name".
        push (`bool`, defaults to `False`): Whether to upload. Otherwise nothing is written, and the network not used.
        private (`bool`, *optional*): Visibility of a repository that does not exist yet. Defaults to the account's.
        commit_message (`str`, *optional*): Defaults to "Upload <folder> with nanollada".
        base_model (`str` or `os.PathLike`, *optional*): Of an adapter: the folder of its model, to verify with.
        revision (`str`, *optional*): Branch; made if it does not exist. Defaults to the main one.

    Returns:
        `str` or `None`: URL of the commit, or `None` for a dry run.

    Raises:
        `ValueError`: for a name that is no repository's, and as `files_to_upload`.
        `VerificationError`: if the folder does not load and generate in a clean process, and if its card says a number
            that its evaluation.json does not hold.
    """
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"`repo_id` must be 'user/name', got {repo_id!r}")
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` must be a folder made by export.py, got {folder}, which is not there")
    files = files_to_upload(folder)
    verify(folder, base_model=base_model)
    sizes = [path.stat().st_size for path in files]
    for path, size in zip(files, sizes, strict=True):
        print(f"{size:>14,}  {path.relative_to(folder)}")
    where = f"{repo_id}{f' ({revision})' if revision else ''}{', private' if private else ''}"
    print(f"{sum(sizes):>14,}  bytes in {len(files)} files, verified, for {where}")
    if not push:
        print("Dry run: nothing was sent. --push uploads.")
        return None
    return _push(folder, files, repo_id, private, commit_message, revision)


def _push(folder: Path, files: list[Path], repo_id: str, private, commit_message, revision) -> str:
    from huggingface_hub import HfApi

    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    text = with_source(REPO_ID.sub(f'repo_id = "{repo_id}"', text), repo_id, revision or "main")
    text = TWIN.sub(f"](https://huggingface.co/{repo_id.split('/')[0]}/", text)
    card.write_text(text, encoding="utf-8")
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message or f"Upload {folder.resolve().name} with nanollada",
        revision=revision,
        allow_patterns=[path.relative_to(folder).as_posix() for path in files],
        delete_patterns=STALE,
    )
    return commit.commit_url


def main(argv: list[str] | None = None) -> int:
    """Parses arguments, verifies, lists, and uploads with --push. Exit status 1 if the folder must not be uploaded."""
    from nanollada.trainers.commands.parser import PlainParser

    parser = PlainParser(description="Upload an exported folder to the Hub (dry run without --push).")
    parser.add_argument("folder", type=Path, help="Folder made by export.py.")
    parser.add_argument("repo_id", help="user/name")
    parser.add_argument("--push", action="store_true", help="Really upload.")
    parser.add_argument("--private", action="store_true", default=None, help="Make a new repository private.")
    parser.add_argument("--commit_message", help='Default: "Upload <folder> with nanollada".')
    parser.add_argument("--base_model", help="Of an adapter: its model's folder (default: the downloaded one).")
    parser.add_argument("--revision", help="Branch, made if it does not exist (default: the main one).")
    try:
        url = upload(**vars(parser.parse_args(argv)))
    except VerificationError as error:
        print(f"not uploaded: {error}", file=sys.stderr)
        return 1
    if url is not None:
        print(url)
    return 0


if __name__ == "__main__":
    run_program(main)
