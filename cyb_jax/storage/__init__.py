"""One interface to files and folders on a disk and in a Google Cloud Storage bucket (`gs://bucket/folder`).

A bucket has no folders, no renames and no locks. It guarantees that writing an object is atomic and that every reader
immediately sees a finished write, and it reports the size and the MD5 digest of each object that it has received.
Buckets are accessed through gcsfs (`pip install 'cyb_jax[gcs]'`), never through TensorFlow. A failing request is
repeated for about half a minute. If it still fails, a StorageError with the bucket's answer is raised.
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
from cyb_jax.storage.paths import Place, absolute, in_bucket, user_cache

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
  "user_cache",
]
