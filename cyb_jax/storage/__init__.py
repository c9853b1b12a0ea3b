"""Files and folders on a disk, or in a bucket of Google Cloud Storage (`gs://bucket/folder`), by the same functions.

A bucket has neither folders nor renames nor locks. It guarantees that an object appears whole or not at all, that every
reader sees a finished write at once, and it reports the size and the MD5 digest of each object that it has received.
Buckets are reached through gcsfs (`pip install 'cyb_jax[gcs]'`), never through TensorFlow. A request that fails for a
moment is repeated for about half a minute. A failure that lasts longer becomes a StorageError with the bucket's answer.
"""

from cyb_jax.storage.bucket import check_bucket, remove_objects, upload_folder
from cyb_jax.storage.failures import access, bucket_errors, starting
from cyb_jax.storage.files import (
  Digest,
  Files,
  atomic_write,
  exists,
  files,
  local_folder,
  make_new,
  move_tree,
  names,
  new_folder,
  place,
  read_bytes,
  remove_tree,
)
from cyb_jax.storage.paths import Place, absolute, in_bucket

__all__ = [
  "Digest",
  "Files",
  "Place",
  "absolute",
  "access",
  "atomic_write",
  "bucket_errors",
  "check_bucket",
  "exists",
  "files",
  "in_bucket",
  "local_folder",
  "make_new",
  "move_tree",
  "names",
  "new_folder",
  "place",
  "read_bytes",
  "remove_objects",
  "remove_tree",
  "starting",
  "upload_folder",
]
