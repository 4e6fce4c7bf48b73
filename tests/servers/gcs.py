"""A small Google Cloud Storage (JSON API) server for tests: python -m tests.servers.gcs [--port P] [--dir DIR].

It exists because nothing obtainable enforces ifGenerationMatch, and a commit protocol tested without it is not tested.
It serves what gcsfs sends: buckets, uploads (media, multipart, resumable), ranged reads, listings in pages, deletes,
rewrite, copy and compose, with conditions and checksums checked as the real service does. State is in gcs_state.py.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import re
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.servers.gcs_state import ApiError, Object, State, check_conditions

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_STATE = web.AppKey("state", State)
_UPLOADS = web.AppKey("uploads", dict[str, "Upload"])
_HASHES = (("crc32c", "crc32c"), ("md5", "md5Hash"))  # names in headers, names in resources
_PLACES = ("location", "customPlacementConfig")
_CHUNK = 256 * 1024  # every chunk of a resumable upload but the last is a multiple of this


class Upload:
    """A resumable upload between its start and its last chunk; kept afterwards so that a retried chunk is answered."""

    def __init__(self, bucket: str, resource: dict[str, Any], query: dict[str, str]) -> None:
        self.bucket, self.resource, self.query = bucket, resource, query
        self.received = bytearray()
        self.done: Object | None = None


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as e:
        detail = {"domain": "global", "reason": e.reason, "message": e.message}
        error = {"code": e.status, "message": e.message, "errors": [detail]}
        return web.json_response({"error": error}, status=e.status)


def _resource(found: Object) -> web.Response:
    return web.json_response(found.resource)


async def create_bucket(request: web.Request) -> web.Response:
    asked = await request.json()
    request.app[_STATE].create_bucket(asked["name"], {k: v for k, v in asked.items() if k in _PLACES})
    return web.json_response({"kind": "storage#bucket", "id": asked["name"], "name": asked["name"]})


async def list_buckets(request: web.Request) -> web.Response:
    items = [{"kind": "storage#bucket", "id": b, "name": b} for b in sorted(request.app[_STATE].buckets)]
    return web.json_response({"kind": "storage#buckets", "items": items})


async def get_bucket(request: web.Request) -> web.Response:
    name = request.match_info["bucket"]
    request.app[_STATE].bucket(name)
    place = {"location": "US", **request.app[_STATE].places.get(name, {})}
    return web.json_response({"kind": "storage#bucket", "id": name, "name": name, "locationType": "region", **place})


async def upload(request: web.Request) -> web.Response:
    """The entry of all uploads: media and multipart in one request, resumable in several."""
    kind, query = request.query.get("uploadType"), dict(request.query)
    bucket, state = request.match_info["bucket"], request.app[_STATE]
    if "upload_id" in query:
        return await _resume(request, query["upload_id"])
    if kind == "resumable":
        return await _start_resumable(request)
    body = await request.read()
    if kind == "media":
        resource: dict[str, Any] = {"name": query["name"], "contentType": request.content_type}
    elif kind == "multipart":
        resource, body = _split_multipart(request.headers["Content-Type"], body)
        resource.setdefault("name", query.get("name"))
    else:
        raise ApiError(400, f"Unknown uploadType {kind!r}.", "badRequest")
    return _resource(state.publish(bucket, resource | _given_hashes(request), body, query))


def _given_hashes(request: web.Request) -> dict[str, str]:
    """Checksums from an X-Goog-Hash header, under the names that they have in a resource."""
    pairs = (item.strip().partition("=")[::2] for item in request.headers.get("X-Goog-Hash", "").split(","))
    return {dict(_HASHES)[name]: value for name, value in pairs if name in dict(_HASHES)}


def _split_multipart(content_type: str, body: bytes) -> tuple[dict[str, Any], bytes]:
    """Metadata and bytes of a multipart/related body. gcsfs ends lines with a bare LF, other clients with CRLF."""
    found = re.search(r'boundary="?([^";]+)"?', content_type)
    if not found:
        raise ApiError(400, "Missing multipart boundary.", "badRequest")
    mark = b"--" + found[1].encode()
    start = body.find(mark) + len(mark)
    eol = b"\r\n" if body[start : start + 2] == b"\r\n" else b"\n"
    metadata_start = body.find(eol * 2, start) + 2 * len(eol)
    metadata_stop = body.find(eol + mark, metadata_start)
    data_start = body.find(eol * 2, metadata_stop + len(eol + mark)) + 2 * len(eol)
    data_stop = body.rfind(eol + mark + b"--")
    if min(metadata_stop, data_stop) < 0 or data_stop < data_start:
        raise ApiError(400, "Malformed multipart body.", "badRequest")
    try:
        return json.loads(body[metadata_start:metadata_stop]), body[data_start:data_stop]
    except ValueError:
        raise ApiError(400, "Parse Error: the metadata part is not JSON.", "parseError") from None


async def _start_resumable(request: web.Request) -> web.Response:
    bucket, query = request.match_info["bucket"], dict(request.query)
    resource = await request.json() if request.can_read_body else {}
    resource.setdefault("name", query.get("name"))
    check_conditions(request.app[_STATE].bucket(bucket).get(resource["name"]), query)
    upload_id = uuid.uuid4().hex
    request.app[_UPLOADS][upload_id] = Upload(bucket, resource, query)
    # The address is built from the Host header, so a client behind a proxy stays behind it.
    location = request.url.with_query({**query, "upload_id": upload_id})
    return web.Response(headers={"Location": str(location), "X-GUploader-UploadID": upload_id})


async def _resume(request: web.Request, upload_id: str) -> web.Response:
    """One chunk, or a question how far the upload is: 308 until the last byte is there, then the object."""
    session = request.app[_UPLOADS].get(upload_id)
    if session is None:
        raise ApiError(404, "Upload session not found.", "notFound")
    body = await request.read()
    pattern = r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)"
    found = re.fullmatch(pattern, request.headers.get("Content-Range", f"bytes 0-{len(body) - 1}/{len(body)}"))
    if not found:
        raise ApiError(400, "Malformed Content-Range.", "badRequest")
    if session.done is not None:
        return _resource(session.done)
    if found[1] is not None:
        start, stop, have = int(found[1]), int(found[2]) + 1, len(session.received)
        last = found[3] == str(stop)
        if stop - start != len(body) or (len(body) % _CHUNK and not last):
            raise ApiError(400, "The chunk has a wrong size.", "badRequest")
        if start <= have < stop:  # what is there already is skipped, what would leave a hole is ignored
            session.received += body[have - start :]
    if found[3] == str(len(session.received)):
        resource = session.resource | _given_hashes(request)
        session.done = request.app[_STATE].publish(session.bucket, resource, bytes(session.received), session.query)
        session.received.clear()
        return _resource(session.done)
    headers = {"Range": f"bytes=0-{len(session.received) - 1}"} if session.received else {}
    return web.Response(status=308, headers=headers)


async def cancel_upload(request: web.Request) -> web.Response:
    request.app[_UPLOADS].pop(request.query.get("upload_id", ""), None)
    return web.Response(status=499)


async def get_object(request: web.Request) -> web.StreamResponse:
    """Metadata, or with alt=media the bytes, whole or a range."""
    state, query = request.app[_STATE], dict(request.query)
    found = state.find(request.match_info["bucket"], request.match_info["key"], query)
    check_conditions(found, query)
    if query.get("alt") != "media":
        return _resource(found)
    size, resource = found.blob.nbytes, found.resource
    headers = {
        "ETag": resource["etag"],
        "x-goog-generation": resource["generation"],
        "x-goog-metageneration": resource["metageneration"],
        "x-goog-hash": ",".join(f"{k}={resource[r]}" for k, r in _HASHES if r in resource),
        "x-goog-stored-content-length": str(size),
        "Content-Type": resource["contentType"],
        "Accept-Ranges": "bytes",
    }
    asked = request.http_range
    if asked.start is None and asked.stop is None:
        return web.Response(body=found.blob.read(0, size), headers=headers)
    start, stop, _ = asked.indices(size)
    if start >= stop:
        headers["Content-Range"] = f"bytes */{size}"
        return web.Response(status=416, text="Requested range not satisfiable", headers=headers)
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return web.Response(status=206, body=found.blob.read(start, stop), headers=headers)


async def list_objects(request: web.Request) -> web.Response:
    """Names in byte order, in pages; with a delimiter, common prefixes once each."""
    q, objects = request.query, request.app[_STATE].bucket(request.match_info["bucket"])
    prefix, delimiter = q.get("prefix", ""), q.get("delimiter", "")
    after = base64.urlsafe_b64decode(q["pageToken"]).decode() if "pageToken" in q else ""
    limit = min(int(q.get("maxResults", 1000)), 1000)
    items: list[dict[str, Any]] = []
    prefixes: list[str] = []
    last, more = "", False
    for name in sorted((n for n in objects if n.startswith(prefix)), key=str.encode):
        cut = name.find(delimiter, len(prefix)) if delimiter else -1
        entry = name[: cut + len(delimiter)] if cut >= 0 else name
        if entry.encode() <= after.encode() or (prefixes and entry == prefixes[-1]):
            continue
        if len(items) + len(prefixes) == limit:
            more = True
            break
        last = entry
        if cut >= 0:
            prefixes.append(entry)
        else:
            items.append(objects[name].resource)
    page: dict[str, Any] = {"kind": "storage#objects"}
    page |= {"items": items} if items else {}
    page |= {"prefixes": prefixes} if prefixes else {}
    page |= {"nextPageToken": base64.urlsafe_b64encode(last.encode()).decode()} if more else {}
    return web.json_response(page)


async def patch_object(request: web.Request) -> web.Response:
    m, query = request.match_info, dict(request.query)
    return _resource(request.app[_STATE].patch(m["bucket"], m["key"], await request.json(), query))


async def delete_object(request: web.Request) -> web.Response:
    m = request.match_info
    request.app[_STATE].delete(m["bucket"], m["key"], dict(request.query))
    return web.Response(status=204)


async def copy_object(request: web.Request) -> web.Response:
    """copyTo and rewriteTo: the whole object in one call, whatever its size."""
    m, query, state = request.match_info, dict(request.query), request.app[_STATE]
    generation = {"generation": query["sourceGeneration"]} if "sourceGeneration" in query else {}
    changes = await request.json() if request.can_read_body else {}
    source = state.find(m["bucket"], m["key"], generation)
    check_conditions(source, query, source=True)
    kept = {k: v for k, v in source.resource.items() if k in ("contentType", "metadata")}
    data = bytes(source.blob.read(0, source.blob.nbytes))
    copy = state.publish(m["bucket2"], {**kept, **changes, "name": m["key2"]}, data, query)
    if m["verb"] == "copyTo":
        return _resource(copy)
    sizes = {"totalBytesRewritten": str(len(data)), "objectSize": str(len(data))}
    return web.json_response({"kind": "storage#rewriteResponse", "done": True, "resource": copy.resource, **sizes})


async def compose_object(request: web.Request) -> web.Response:
    """Concatenate up to 32 objects of one bucket."""
    m, query, state = request.match_info, dict(request.query), request.app[_STATE]
    wanted = await request.json()
    if not 1 <= len(wanted["sourceObjects"]) <= 32:
        raise ApiError(400, "The number of source components must be between 1 and 32.", "invalid")
    sources = [state.find(m["bucket"], s["name"], s) for s in wanted["sourceObjects"]]
    data = b"".join(s.blob.read(0, s.blob.nbytes) for s in sources)
    resource = {**wanted.get("destination", {}), "name": m["key"], "componentCount": len(sources)}
    return _resource(state.publish(m["bucket"], resource, data, query))


def make_app(directory: Path | None) -> web.Application:
    """The application over a directory, or in memory."""
    app = web.Application(client_max_size=1 << 34, middlewares=[_answer_errors])
    app[_STATE], app[_UPLOADS] = State(directory), {}
    buckets = "/storage/v1/b"
    objects = buckets + "/{bucket}/o"
    one = objects + "/{key:[^/]+}"  # quoted slashes do not end it, and braces, which the default excludes, are legal
    for prefix in ("/upload", "/resumable/upload"):
        app.router.add_post(prefix + objects, upload)
        app.router.add_put(prefix + objects, upload)
        app.router.add_delete(prefix + objects, cancel_upload)
    app.router.add_get(buckets, list_buckets)
    app.router.add_post(buckets, create_bucket)
    app.router.add_get(buckets + "/{bucket}", get_bucket)
    app.router.add_get(objects, list_objects)
    app.router.add_get(one, get_object)
    app.router.add_get("/download" + one, get_object)
    app.router.add_patch(one, patch_object)
    app.router.add_delete(one, delete_object)
    app.router.add_post(one + "/{verb:rewriteTo|copyTo}/b/{bucket2}/o/{key2:[^/]+}", copy_object)
    app.router.add_post(one + "/compose", compose_object)
    return app


async def serve(port: int, directory: Path | None) -> None:
    """Serve on loopback until killed; the first line of output is the port."""
    runner = web.AppRunner(make_app(directory), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--dir", type=Path, help="keep objects here instead of in memory")
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.port, arguments.dir))


if __name__ == "__main__":
    main()
