"""A bucket in memory behind the JSON API of Google Cloud Storage, as far as gcsfs and TensorStore use it, and its
faults.

`serving` serves it from a thread of this process, for all tests alike: TensorStore looks once where its server is.
"""

import base64
import functools
import hashlib
import json
import os
import re
import socket
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME = "runs"


class Bucket:
  """One bucket, `gs://runs`.

  Attributes:
    objects: by name, (content, generation).
    requests: of each, (method, name of the object or prefix), in order.
    trouble: asked with (method, name, length of the body) before each request is answered: None, an HTTP status, or
      'cut', which closes the connection in the middle.
  """

  def __init__(self):
    self.objects: dict[str, tuple[bytes, int]] = {}
    self.requests: list[tuple[str, str]] = []
    self.trouble = None
    self.lock = threading.RLock()
    self.sessions: dict[str, tuple[str, dict[str, str], bytearray]] = {}
    self._generation = 0
    self._server = None
    self._connections: set[socket.socket] = set()
    with socket.create_server(("127.0.0.1", 0)) as probe:
      self.port = probe.getsockname()[1]

  @property
  def environment(self):
    url = f"http://127.0.0.1:{self.port}"
    nobody = {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "FSSPEC_GCS_TOKEN": "anon"}
    # gcsfs must not use gRPC, whichever module imports it first.
    plain = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url} | nobody | plain

  def open(self):
    """Accepts connections; also after `refuse`."""
    handler = type("Handler", (_Handler,), {"bucket": self})
    self._server = _Server(("127.0.0.1", self.port), handler, self._connections)
    threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

  def refuse(self):
    """Closes all connections and refuses new ones."""
    server, self._server = self._server, None
    server.shutdown()
    server.server_close()
    for connection in list(self._connections):
      try:
        connection.shutdown(socket.SHUT_RDWR)
      except OSError:
        continue

  def clear(self):
    """Resets the bucket to its initial state, accepting connections."""
    with self.lock:
      self.objects.clear()
      self.requests.clear()
      self.trouble = None
    if self._server is None:
      self.open()

  def put(self, name, content):
    with self.lock:
      self._generation += 1
      self.objects[name] = bytes(content), self._generation

  def names(self, prefix=""):
    with self.lock:
      return sorted(name for name in self.objects if name.startswith(prefix))

  def contents(self, prefix=""):
    with self.lock:
      return {name: content for name, (content, _) in self.objects.items() if name.startswith(prefix)}

  def described(self, name):
    content, generation = self.objects[name]
    now = "2026-01-01T00:00:00.000Z"
    return {
      "kind": "storage#object",
      "name": name,
      "bucket": NAME,
      "id": f"{NAME}/{name}/{generation}",
      "size": str(len(content)),
      "generation": str(generation),
      "metageneration": "1",
      "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
      "contentType": "application/octet-stream",
      "timeCreated": now,
      "updated": now,
      "storageClass": "STANDARD",
    }


def troubles(statuses, method="", matching=""):
  """A `trouble` that returns the statuses one after the other, for requests of a method (or any) whose name matches."""
  left = list(statuses)

  def trouble(asked, name, length):
    del length
    return left.pop(0) if left and asked.startswith(method) and re.search(matching, name) else None

  return trouble


@functools.cache
def serving():
  """The bucket, accepting connections; requests of this process are also sent to it."""
  import fsspec

  bucket = Bucket()
  bucket.open()
  os.environ.update(bucket.environment)
  fsspec.config.conf.setdefault("gcs", {})["token"] = "anon"
  return bucket


class _Server(ThreadingHTTPServer):
  daemon_threads = True
  block_on_close = False
  request_queue_size = 128

  def __init__(self, address, handler, connections):
    self._connections = connections
    super().__init__(address, handler)

  def process_request(self, request, client_address):
    self._connections.add(request)
    super().process_request(request, client_address)

  def shutdown_request(self, request):
    self._connections.discard(request)
    super().shutdown_request(request)

  def handle_error(self, request, client_address):
    pass  # programs are killed in the middle of requests


class _Handler(BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  bucket: Bucket

  def log_message(self, *_):
    pass

  def setup(self):
    super().setup()
    self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

  def _body(self):
    if "chunked" in self.headers.get("Transfer-Encoding", ""):
      parts = []
      while size := int(self.rfile.readline().split(b";")[0], 16):
        parts.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b"".join(parts)
    return self.rfile.read(int(self.headers.get("Content-Length", 0)))

  def _reply(self, status, content=b"", **headers):
    if not isinstance(content, bytes):
      content = json.dumps(content).encode()
      headers.setdefault("Content_Type", "application/json; charset=UTF-8")
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  def _error(self, status):
    words = {
      404: "Not Found",
      403: "does not have storage.objects access",
      412: "conditionNotMet",
      503: "Backend Error",
    }
    self._reply(status, {"error": {"code": status, "message": words.get(status, "error"), "errors": []}})

  def _do(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    body = self._body()
    parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
    path = [p for p in parts if p not in ("storage", "v1", "upload", "download")]
    name = query.get("name") or query.get("prefix") or "".join(path[3:4])
    if "upload_id" in query:
      name = self.bucket.sessions[query["upload_id"]][0]
    elif query.get("uploadType") in ("multipart", "resumable") and not query.get("name"):
      name = self._described_upload(query, body)[0]
    with self.bucket.lock:
      self.bucket.requests.append((self.command, name))
      trouble = self.bucket.trouble(self.command, name, len(body)) if self.bucket.trouble else None
    if trouble == "cut":
      self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf of i")
      self.close_connection = True
      return None
    if trouble:
      return self._error(trouble)
    if path[:1] != ["b"] or (len(path) > 1 and path[1] != NAME):
      return self._error(404)
    with self.bucket.lock:
      if len(path) == 2:
        return self._reply(200, {"kind": "storage#bucket", "name": NAME, "id": NAME})
      if url.path.startswith("/upload"):
        return self._upload(query, body, name)
      if len(path) == 3:
        return self._list(query)
      return self._object(query, path[3], path[4:])

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _do

  def _refused(self, name, query):
    """The status for a failed precondition: 412, or 304 if the reader already has the object; otherwise None."""
    generation = self.bucket.objects.get(name, (b"", 0))[1]
    if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
      return 412
    if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation and generation:
      return 304
    return None

  def _object(self, query, name, verb):
    bucket = self.bucket
    if name not in bucket.objects:
      return self._error(404)
    if refused := self._refused(name, query):
      return self._reply(304) if refused == 304 else self._error(refused)
    if verb and verb[0] in ("rewriteTo", "moveTo"):
      target = verb[-1]
      bucket.put(target, bucket.objects[name][0])
      if verb[0] == "moveTo":
        del bucket.objects[name]
        return self._reply(200, bucket.described(target))
      return self._reply(200, {"kind": "storage#rewriteResponse", "done": True, "resource": bucket.described(target)})
    if self.command == "DELETE":
      del bucket.objects[name]
      return self._reply(204)
    if query.get("alt") != "media":
      return self._reply(200, bucket.described(name))
    content, generation = bucket.objects[name]
    headers = {"x_goog_generation": str(generation), "x_goog_metageneration": "1", "ETag": f'"{generation}"'}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    if asked is None:
      return self._reply(200, content, **headers)
    if not asked[1]:
      first, last = max(0, len(content) - int(asked[2])), len(content) - 1
    else:
      first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    if first > last:
      return self._reply(416, Content_Range=f"bytes */{len(content)}")
    headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
    return self._reply(206, content[first : last + 1], **headers)

  def _list(self, query):
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    first, limit = query.get("pageToken", query.get("startOffset", "")), int(query.get("maxResults", 1000))
    items, prefixes, token = [], [], None
    for name in self.bucket.names(prefix):
      end = name.find(delimiter, len(prefix)) if delimiter else -1
      shown = name if end < 0 else name[: end + len(delimiter)]
      if shown in prefixes or shown < first or ("endOffset" in query and name >= query["endOffset"]):
        continue
      if len(items) + len(prefixes) == limit:
        token = shown
        break
      if end < 0:
        items.append(self.bucket.described(name))
      else:
        prefixes.append(shown)
    page = {"kind": "storage#objects", "items": items, "prefixes": prefixes}
    self._reply(200, page | ({"nextPageToken": token} if token else {}))

  def _described_upload(self, query, body):
    """(name, content) of a multipart upload, or of the start of a resumable one."""
    if query.get("uploadType") == "resumable":
      return json.loads(body or b"{}").get("name", ""), b""
    boundary = b"--" + re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
    described, content = body.split(boundary, 2)[1:]
    content = content[: content.rindex(boundary)]
    described, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (described, content))
    return json.loads(described)["name"], re.sub(rb"\r?\n\Z", b"", content)

  def _upload(self, query, body, name):
    if "upload_id" in query:
      return self._resumed(query["upload_id"], body)
    if refused := self._refused(name, query):
      return self._error(412 if refused == 304 else refused)
    kind = query["uploadType"]
    if kind == "resumable":
      session = f"{len(self.bucket.sessions)}-{time.monotonic_ns()}"
      self.bucket.sessions[session] = name, query, bytearray()
      url = f"http://127.0.0.1:{self.bucket.port}/upload/storage/v1/b/{NAME}/o?uploadType=resumable&upload_id={session}"
      return self._reply(200, b"", Location=url)
    self.bucket.put(name, body if kind == "media" else self._described_upload(query, body)[1])
    return self._reply(200, self.bucket.described(name))

  def _resumed(self, session, body):
    name, query, content = self.bucket.sessions[session]
    if self.command == "DELETE":
      del self.bucket.sessions[session]
      return self._reply(499)
    place = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers.get("Content-Range", "bytes 0-0/*"))
    if place and place[1]:
      content[int(place[1]) :] = body
    if place and place[2] != "*" and len(content) == int(place[2]):
      if refused := self._refused(name, query):
        return self._error(refused)
      self.bucket.put(name, content)
      return self._reply(200, self.bucket.described(name))
    headers = {"Range": f"bytes=0-{len(content) - 1}"} if content else {}
    return self._reply(308, b"", **headers)
