"""Where a dataset lies: in a local folder, or behind a URL that fsspec opens.

From remote storage whole blocks are asked for, so that neighbours cost one request, and kept on the local disk
(`disk_cache`). What is kept is called by the file's address, size and version there: what was changed since is never
taken for what it was.
"""

import hashlib
import itertools
import logging
import math
import os
import random
import re
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, model_validator

from configs.loader import StrictConfig, UserError

from .disk_cache import DiskCache
from .shards import Bytes, ShardError, ShardReader

logger = logging.getLogger(__name__)

Url = Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://[^/]"), AfterValidator(lambda url: url.rstrip("/"))]
Address = Path | Url
"""A local folder, or the URL of a remote one (a `Path` would make `s3:/` of `s3://`). Both are printed as they are."""

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp", "memory": ""}
"""Protocol -> the package that fsspec needs for it."""

TRAFFIC = ("requests", "retries")
"""What is counted of the exchange with remote storage."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


class StorageConfig(StrictConfig):
    """How remote datasets are read; one in a local folder needs none of it."""

    cache_dir: Path = Field(
        Path("~/.cache/foresight"),
        description="Folder on a disk of this machine; all processes and runs on it share what is there.",
    )
    cache_gb: PositiveFloat = Field(50, le=10**7, description="Kept at most; what was used longest ago goes first.")
    block_mb: PositiveFloat = Field(
        8, le=2**14, description="What is asked for at once, so that neighbours cost one request."
    )
    retries: NonNegativeInt = Field(6, le=1000, description="Of a request that failed, with growing pauses between.")
    timeout_s: PositiveFloat = Field(60, le=10**6, description="After which a request counts as failed.")

    @property
    def block_size(self) -> int:
        return max(1, round(self.block_mb * 2**20))

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        if self.cache_gb * 2**30 < 4 * self.block_size:
            raise ValueError(f"cache_gb={self.cache_gb:g} holds less than four blocks of {self.block_mb:g} MB")
        return self


class DatasetFiles(Protocol):
    """The files of a dataset, by their names in its folder."""

    traffic: Counter[str]  # `TRAFFIC` of this process since it was last cleared
    max_kept: float  # bytes that are kept on this machine at most

    def fetch(self, names: Sequence[str]) -> Path:
        """A local folder that holds those of these files that exist."""
        ...

    def size(self, name: str) -> int: ...

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those that are known not to be there. Remote storage is not asked for so many at once."""
        ...

    def announce(self, name: str, offset: int, num_bytes: int) -> None:
        """That these bytes will be read soon, for whom it helps to know."""
        ...

    def read(self, name: str, offset: int, num_bytes: int) -> Bytes:
        """ShardError where the file is missing, ends before, or cannot be read."""
        ...


class LocalFiles(ShardReader):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.traffic: Counter[str] = Counter()
        self.max_kept = math.inf

    def fetch(self, names: Sequence[str]) -> Path:
        return self.root

    def missing(self, names: Sequence[str]) -> list[str]:
        """By a look into each folder: a question about each file takes minutes on a cluster's file system."""
        folders = {name.rpartition("/")[0] for name in names}
        there = {f"{folder}/{file}" for folder in folders for file in _names_in(self.root / folder)}
        return [name for name in names if name not in there]


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # what cannot be seen cannot be read either
        return []


def open_files(address: Address, config: StorageConfig) -> DatasetFiles:
    if not isinstance(address, Path):
        return RemoteFiles(address, config)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(/|$)", str(address)) and not address.exists():
        protocol, _, rest = str(address).partition(":")
        raise UserError(
            f"{address}: is neither a folder nor an address; write {protocol.lower()}://"
            f"{rest.lstrip('/') or 'HOST/FOLDER'}, or give a local folder."
        )
    return LocalFiles(address)


# --- remote -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RemoteFile:
    name: str
    size: int
    version: str


class RemoteFiles:
    """Files behind a URL. Connections are opened by the process that needs them: fsspec's do not survive a fork."""

    def __init__(self, address: str, config: StorageConfig) -> None:
        self.address, self.config = address.rstrip("/"), config
        self.traffic: Counter[str] = Counter()
        self.max_kept = config.cache_gb * 2**30
        self._protocol = address.partition("://")[0]
        if self._protocol not in PACKAGES:
            known = ", ".join(f"{name}://" for name in PACKAGES if name != "memory")
            raise UserError(f"{address}: {self._protocol}:// is not known; give a local folder, or one of {known}.")
        try:
            self._cache = DiskCache(config.cache_dir, round(self.max_kept))
        except OSError as error:
            raise self._cannot_keep(error) from None
        self._known: dict[str, _RemoteFile] = {}
        # Stands for the version where a server tells none: what it sends is good for this run only.
        self._no_version = secrets.token_hex(8)
        self._connections: list[tuple[int, Any]] = []
        self._connect()

    # --- what datasets are read by --------------------------------------------------------------------------------

    def fetch(self, names: Sequence[str]) -> Path:
        try:
            files = [file for name in names if (file := self._find_or_skip(name, may_skip=name != names[0]))]
            if not files:
                raise UserError(
                    f"{self.address}: holds no {names[0]}, or there is no such bucket or folder; give the address of a "
                    "copy of a finished build's `out` folder."
                )
            group = self._cache.hold(_digest(self.address, *files))
            with self._cache.alone(group.name):
                for file in files:
                    if not self._cache.has(group, file.name):
                        self._keep(group, file)
        except _RemoteError as error:
            raise UserError(f"{self.address}: {error}; {self._next_move(error)}.") from error
        except OSError as error:
            raise self._cannot_keep(error) from None
        return group / "files"

    def size(self, name: str) -> int:
        return self._file(name).size

    def missing(self, names: Sequence[str]) -> list[str]:
        return []

    def announce(self, name: str, offset: int, num_bytes: int) -> None:
        """Nothing: whole blocks are fetched, by as many workers as there are."""

    def read(self, name: str, offset: int, num_bytes: int) -> bytes:
        file, end, size = self._file(name), offset + num_bytes, self.config.block_size
        if end > file.size:
            raise ShardError(f"ends at byte {file.size}, but this sample should reach to byte {end}", "truncated_shard")
        blocks = range(offset // size * size, end, size)
        try:
            parts = [self._read_in_block(file, start, max(offset, start), min(end, start + size)) for start in blocks]
        except _RemoteError as error:
            self._known.pop(name, None)  # it may have become another file
            raise error.as_shard_error() from error
        return b"".join(parts)

    def _read_in_block(self, file: _RemoteFile, start: int, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a file, all of them in the block that starts at `start`."""
        length = min(self.config.block_size, file.size - start)
        key = _digest(self.address, file, start, length)
        where = (key, length, begin - start, end - start)
        part = self._cache.read(*where)
        if part is not None:
            return part
        with self._cache.alone(key):
            part = self._cache.read(*where)  # another process may just have fetched it
            if part is not None:
                return part
            block = self._request_range(file, start, length)
            self._try_to_keep(key, block)
        return block[begin - start : end - start]

    def _try_to_keep(self, key: str, block: bytes) -> None:
        try:
            self._cache.write(key, block)
        except OSError as error:  # a full disk costs speed, not the run
            logger.warning("%s: %s; what is read from %s is not kept", self._cache.folder, error.strerror, self.address)

    def _cannot_keep(self, error: OSError) -> UserError:
        return UserError(
            f"{self.config.cache_dir}: {error.strerror}, so remote data cannot be kept there; set storage.cache_dir to "
            "a folder on a local disk with some space."
        )

    def _find_or_skip(self, name: str, *, may_skip: bool) -> _RemoteFile | None:
        try:
            return self._find(name)
        except _RemoteError as error:
            if not may_skip or error.problem != "refused":
                raise
            # S3 refuses also what does not exist, to whom may not list.
            logger.warning("%s/%s: %s; going on without it", self.address, name, error)
            return None

    def _keep(self, group: Path, file: _RemoteFile) -> None:
        if not self._cache.make_room(file.size):
            raise UserError(
                f"{self.address}: its {file.name} takes {file.size / 2**30:.3g} GB, which storage.cache_gb="
                f"{self.config.cache_gb:g} leaves no room for; raise it."
            )
        size = self.config.block_size
        starts = range(0, file.size, size)
        self._cache.put(
            group, file.name, (self._request_range(file, start, min(size, file.size - start)) for start in starts)
        )

    def _file(self, name: str) -> _RemoteFile:
        try:
            file = self._find(name)
        except _RemoteError as error:
            raise error.as_shard_error() from error
        if file is None:
            raise ShardError("cannot be opened (No such file)", "missing_shard")
        return file

    def _find(self, name: str) -> _RemoteFile | None:
        if name not in self._known:
            try:
                info = self._request("info", name)
            except _RemoteError as error:
                if error.problem == "missing":
                    return None
                raise
            if info.get("size") is None:
                raise _RemoteError("unreadable", f"the server does not tell the size of {name}")
            version = next((str(info[field]) for field in _VERSION_FIELDS if info.get(field)), self._no_version)
            self._known[name] = _RemoteFile(name, info["size"], version)
        return self._known[name]

    # --- requests -------------------------------------------------------------------------------------------------

    def _request_range(self, file: _RemoteFile, start: int, length: int) -> bytes:
        return self._request("cat_file", file.name, start=start, end=start + length)

    def _request(self, method: Literal["info", "cat_file"], name: str, **span: int) -> Any:
        """Asks until there is an answer, or no hope of one."""
        filesystem, root = self._connect()
        for attempt in itertools.count():
            self.traffic["requests"] += 1
            try:
                return self._ask(filesystem, method, f"{root}/{name}", **span)
            except Exception as error:  # the clients' errors have no common base class
                told = _told(error, self._protocol)
                if told.is_final or attempt == self.config.retries:
                    raise told from error
            self.traffic["retries"] += 1
            pause_s = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S)
            time.sleep(pause_s * random.uniform(0.5, 1))  # many readers should not come back at the same moment

    def _ask(self, filesystem: Any, method: str, path: str, **span: int) -> Any:
        options: dict[str, Any] = dict(span)
        if filesystem.async_impl:  # fsspec waits for a thread of its own; other clients have their own timeouts
            options["timeout"] = self.config.timeout_s
        elif span:  # and read ahead, which is not wanted here
            options["cache_type"] = "none"
        answer = getattr(filesystem, method)(path, **options)
        expected = span.get("end", 0) - span.get("start", 0)
        if span and len(answer) != expected:
            raise _RemoteError(
                "unreadable", f"{len(answer)} bytes came instead of {expected}", is_final=len(answer) > expected
            )
        return answer

    def _connect(self) -> tuple[Any, str]:
        if not self._connections or self._connections[-1][0] != os.getpid():
            # One that was inherited is left as it is: closing it here would close it for the parent, too.
            self._connections.append((os.getpid(), self._open_connection()))
        return self._connections[-1][1]

    def _open_connection(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs  # takes a while, and local datasets need none of it

        # gcsfs would ask over gRPC what kind of bucket it is, and gRPC's threads do not survive a fork either.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        try:
            return url_to_fs(self.address)
        except ImportError:
            package = PACKAGES[self._protocol]
            raise UserError(
                f"{self.address}: reading {self._protocol}:// needs the package {package}; install it with `pip "
                f"install {package}`, or all of them with `pip install 'foresight-wam[remote]'`."
            ) from None
        except ValueError as error:
            raise UserError(f"{self.address}: is no address ({error}); give that of a dataset's folder.") from None

    def _next_move(self, error: "_RemoteError") -> str:
        return _CREDENTIALS.get(self._protocol, "check the address") if error.problem == "refused" else _CHECK

    def __getstate__(self) -> dict[str, Any]:
        """A spawned process opens its own connections."""
        return self.__dict__ | {"_connections": []}


_VERSION_FIELDS = ("ETag", "etag", "md5Hash", "blob_id", "Last-Modified", "LastModified", "mtime", "created")
"""Of what fsspec tells of a file, under the names of the different clients: that which changes with its content."""

_CHECK = "check the address, and whether this machine reaches it"
_CREDENTIALS = {
    "s3": "check the address and the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or `aws configure`)",
    "gs": "check the address and the credentials (`gcloud auth application-default login`)",
    "hf": "check the address and the token (`hf auth login`, or HF_TOKEN)",
}


def _digest(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()


# --- what goes wrong ----------------------------------------------------------------------------------------------

_Problem = Literal["missing", "refused", "unreadable"]


class _RemoteError(Exception):
    """`is_final`: asking again would not help."""

    def __init__(self, problem: _Problem, what: str, is_final: bool = True) -> None:
        super().__init__(what)
        self.problem, self.is_final = problem, is_final

    def as_shard_error(self) -> ShardError:
        if self.problem == "missing":
            return ShardError("cannot be opened (No such file)", "missing_shard")
        return ShardError(f"cannot be read ({self})", "unreadable_shard")


_TRY_AGAIN = {408, 425, 429}
"""Of the statuses from 400 to 499, which say that the request is wrong, those that may pass."""


def _told(error: BaseException, protocol: str) -> _RemoteError:
    """What an error of one of the clients means."""
    if isinstance(error, _RemoteError):
        return error
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None and protocol in ("http", "https"):
        error = error.__cause__  # fsspec calls everything "not found" that kept it from finding out
    status = _status(error)
    lines = str(error).splitlines() or ["no answer in time" if isinstance(error, TimeoutError) else ""]
    what = f"{type(error).__name__}: {lines[0]}".rstrip(": ")[:200]
    if status in (404, 410) or (status is None and isinstance(error, FileNotFoundError)):
        return _RemoteError("missing", what)
    if status in (401, 403) or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return _RemoteError("refused", what)
    is_wrong = status is not None and 400 <= status < 500 and status not in _TRY_AGAIN
    return _RemoteError("unreadable", what, is_wrong or isinstance(error, ValueError | TypeError | AttributeError))


def _status(error: BaseException) -> int | None:
    """The HTTP status, wherever the client keeps it (aiohttp, gcsfs, huggingface_hub)."""
    places = (error, getattr(error, "response", None))
    values = (getattr(place, name, None) for place in places for name in ("status", "code", "status_code"))
    return next((int(value) for value in values if isinstance(value, int)), None)
