"""Where a dataset is stored: a folder or an S3 prefix, behind one interface (`base.Storage`)."""

from __future__ import annotations

from pathlib import Path

from shards.errors import UserError
from shards.storage.base import Storage
from shards.storage.local import LocalStorage


def open_storage(root: str | Path) -> Storage:
    """The storage behind a folder or `s3://bucket/prefix[?endpoint=URL]`; nothing is touched yet."""
    if str(root).startswith("s3://"):
        from shards.storage.s3 import open_s3  # boto3 is heavy

        return open_s3(str(root))
    if "://" in str(root):
        raise UserError(f"{root}: not a root this project reads", expected="a folder or s3://bucket/prefix")
    return LocalStorage(Path(root))
