"""Download a dataset of the Hugging Face Hub: complete, checked, and resumable.

The `datasets` library says which files make up the splits. huggingface_hub fetches each into NAME.part, continuing
where an earlier command stopped. A file gets its name only when its size and digest equal the Hub's, and source.json is
written only when all files are there. Both libraries obey HF_ENDPOINT and HF_TOKEN.
"""

import contextlib
import hashlib
import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from corpus.record import RECORD_FILE, Record, RecordedFile
from corpus.sources import HUB_ID, SUFFIXES, check_label, folder_of
from llamalet.errors import DISK_FULL, DataError, DiskError
from llamalet.files import check_writable, home_folder, sha256_of

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

FILES_FOLDER = "download"  # next to source.json; the files keep their names on the Hub
HUB_URL = re.compile(r"hf://datasets/(?P<repo>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)")
ATTEMPTS = 2  # the second one starts from an empty file


def download(label: str, data_dir: Path, *, max_files: int | None) -> Record:
    """Download the training and validation files of a Hub dataset into data_dir/NAME; files already there are kept.

    Args:
        label: the dataset's ID, or ID:CONFIG.
        data_dir: the folder of all sources.
        max_files: take only the first N training files; None takes all.

    Raises:
        DataError: if the Hub cannot be reached or refuses, or a file differs from the Hub's; or there is no home.
        DiskError: if the folder cannot be written to, or the disk is full.
    """
    if home_folder() is None:
        raise DataError(f"{label}: the Hub's libraries need a home for their caches, and HOME is not set; set it")
    folder = folder_of(label, data_dir)
    known = Record.read(folder)
    if known is not None:
        check_label(folder, known, label)
    check_writable(folder)
    with _in_one_line(label):
        splits = _resolve(label)
        splits["train"] = splits["train"][:max_files]
        wanted = {split: _describe(urls) for split, urls in splits.items()}
    repo, revision, _ = _parse(splits["train"][0])
    (folder / RECORD_FILE).unlink(missing_ok=True)
    files: dict[str, tuple[RecordedFile, ...]] = {}
    for split, entries in wanted.items():
        for entry in entries:
            target = folder / FILES_FOLDER / entry.path
            with _in_one_line(label):
                outcome = _fetch(repo, revision, entry, folder / FILES_FOLDER)
            print(f"{target}: {entry.size / 1e6:.1f} MB, {outcome}, checked")
            files[split] = (*files.get(split, ()), RecordedFile.of(target, folder))
    return Record(source=label, revision=revision, files=files).write(folder)


def _resolve(label: str) -> dict[str, list[str]]:
    """Return the hf:// addresses of the files of train and, where the dataset has one, val."""
    import datasets

    match = HUB_ID.fullmatch(label)
    if match is None:
        raise DataError("not the ID or ID:CONFIG of a Hub dataset, and no such file or folder")
    files = datasets.load_dataset_builder(match["id"], match["config"]).config.data_files or {}
    if "train" not in files:
        raise DataError(f"it has no split 'train', only: {', '.join(map(str, files)) or 'none'}")
    splits = {"train": [str(url) for url in files["train"]]}
    if "validation" in files:
        splits["val"] = [str(url) for url in files["validation"]]
    for url in (url for urls in splits.values() for url in urls):
        if not HUB_URL.fullmatch(url) or not url.endswith(SUFFIXES):
            raise DataError(f"{url}: only {', '.join(SUFFIXES)} files on the Hub itself can be read")
    return splits


def _parse(url: str) -> tuple[str, str, str]:
    """Return repository, commit and path of an hf:// address."""
    match = HUB_URL.fullmatch(url)
    assert match is not None, url  # _resolve lets no other through
    return match["repo"], urllib.parse.unquote(match["revision"]), urllib.parse.unquote(match["path"])


def _describe(urls: Sequence[str]) -> "list[RepoFile]":
    """Return the Hub's entries for some files: path, size, digest."""
    from huggingface_hub import HfApi, RepoFile

    repo, revision, _ = _parse(urls[0])
    paths = [_parse(url)[2] for url in urls]
    found = HfApi().get_paths_info(repo, paths, revision=revision, repo_type="dataset")
    entries = {entry.path: entry for entry in found if isinstance(entry, RepoFile)}
    for path in paths:
        if path not in entries or Path(path).is_absolute() or ".." in Path(path).parts:
            raise DataError(f"{path}: the Hub lists this file but does not describe it")
    return [entries[path] for path in paths]


def _fetch(repo: str, revision: str, entry: "RepoFile", folder: Path) -> str:
    """Make sure that `folder` has a file equal to the Hub's; return whether it was downloaded or already there."""
    # hf_hub_download restarts an interrupted file and trusts any file of the right name, hence http_get.
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    target = folder / entry.path
    part = target.with_name(target.name + ".part")
    if _mismatch(target, entry) is None:
        return "already there"
    target.parent.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(repo, entry.path, repo_type="dataset", revision=revision)
    problem: str | None = None
    for _ in range(ATTEMPTS):
        with part.open("ab") as file:
            if file.tell() > entry.size:
                file.truncate(0)
            try:
                http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=entry.size)
            except OSError as error:
                if type(error) is not OSError or error.errno is not None:
                    raise
                # A wrong size; the comparison below says more about it.
            file.flush()
            os.fsync(file.fileno())
        problem = _mismatch(part, entry)
        if problem is None:
            os.replace(part, target)
            return "downloaded"
        part.unlink()
    raise DataError(f"{target}: {problem}, {ATTEMPTS} times: something between here and the Hub changes the data")


def _mismatch(path: Path, entry: "RepoFile") -> str | None:
    """Return how a file differs from the Hub's, or None.

    The Hub lists the sha256 of large files, and git's digest of small ones: the sha1 of "blob SIZE", a zero byte and
    the content.
    """
    if not path.is_file():
        return "missing"
    if path.stat().st_size != entry.size:
        return f"{path.stat().st_size} bytes where the Hub has {entry.size}"
    if entry.lfs is not None:
        expected, found = entry.lfs.sha256, sha256_of(path)
    else:
        expected, found = entry.blob_id, hashlib.sha1(b"blob %d\0" % entry.size + path.read_bytes()).hexdigest()
    return None if found == expected else f"digest {found} where the Hub has {expected}"


@contextlib.contextmanager
def _in_one_line(label: str) -> Iterator[None]:
    """Turn any exception of the libraries into one line that says what to do next."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{label}: {error}") from None
    except ModuleNotFoundError:  # says what to install
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise DiskError(f"{label}: {error.strerror}; free some space and type the command again") from None
        what = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(
            f"{label}: {what}; type the command again to continue; complete files are kept. "
            "Without a network: python tinystories.py synthesize"
        ) from error
