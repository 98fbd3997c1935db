"""A dataset of the Hugging Face Hub becomes local files that are complete and checked.

The `datasets` library says which files make up the splits. huggingface_hub fetches each into NAME.part and goes on
where an earlier command was cut off. Then size and digest are compared here: only a file that equals the Hub's gets its
name, and only when all are there does source.json say so. Both libraries obey HF_ENDPOINT and HF_TOKEN.
"""

import contextlib
import errno
import hashlib
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from corpus.sources import HUB_ID, RECORD_FILE, SUFFIXES, Record, RecordedFile, folder_of, sha256_of
from llamalet.errors import DataError, DiskError

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

FILES_FOLDER = "download"  # beside source.json; the files keep their names on the Hub
HUB_URL = re.compile(r"hf://datasets/(?P<repo>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)")
ATTEMPTS = 2  # the second one starts the file anew


def download(label: str, data_dir: Path, *, max_files: int | None, report: Callable[[str], None]) -> Record:
    """Bring the training and validation files of a Hub dataset into data_dir/NAME, as far as they are not there.

    Args:
        label: the dataset's ID, or ID:CONFIG.
        data_dir: where sources lie.
        max_files: how many of the training files to take, from the first; all when None.
        report: called with a line about each file.

    Raises:
        DataError: if the Hub cannot be reached or refuses, or a file is not what it should be.
    """
    folder = folder_of(label, data_dir)
    known = Record.read(folder)
    if known is not None and known.source != label:
        raise DataError(f"{folder}: holds {known.source}, not {label}; delete it or choose another --data-dir")
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
                news = _fetch(repo, revision, entry, folder / FILES_FOLDER)
            report(f"{target}: {entry.size / 1e6:.1f} MB, {news}, checked")
            recorded = RecordedFile(target.relative_to(folder).as_posix(), entry.size, sha256_of(target))
            files[split] = (*files.get(split, ()), recorded)
    record = Record(source=label, revision=revision, files=files)
    record.write(folder)
    return record


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
    """Return what the Hub says of some files: path, size, digest."""
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
    """See to it that a file lies in `folder` and equals the Hub's; return how that came about."""
    # hf_hub_download starts an interrupted file anew, and takes any file of the right name for the right one.
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    target = folder / entry.path
    part = target.with_name(target.name + ".part")
    if _difference(target, entry) is None:
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
                # It complains about the size, of which the comparison below says more.
            file.flush()
            os.fsync(file.fileno())
        problem = _difference(part, entry)
        if problem is None:
            os.replace(part, target)
            return "downloaded"
        part.unlink()
    raise DataError(f"{target}: {problem}, {ATTEMPTS} times: something on the way changes the data")


def _difference(path: Path, entry: "RepoFile") -> str | None:
    """Return how a file differs from the Hub's, or None.

    The Hub knows the sha256 of large files; of small ones it has git's digest, the sha1 of "blob SIZE", a zero and the
    bytes.
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
    """Turn whatever the libraries raise over network, Hub or disk into one line that says how to go on."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{label}: {error}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(f"{label}: {error.strerror}; free some space and type the command again") from None
        what = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(
            f"{label}: {what}; type the command again to go on, what is complete is kept. "
            "Without a network: python tinystories.py synthesize"
        ) from error
