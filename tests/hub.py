"""A hub on this machine: as much of Hugging Face's interface as uploading and downloading a repository calls, and its refusals."""

import base64
import contextlib
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

from web import serving


class Hub:
    """Repositories as {name: Repository}; `token` may do all; `gated` repositories are refused to all others."""

    def __init__(self):
        self.repositories, self.objects, self.token, self.gated, self.uploaded = {}, {}, "hf_token", set(), []


class Repository:
    def __init__(self, private):
        self.private, self.commits, self.refs = private, {}, {}
        self.commit({}, "first")

    def commit(self, files, message):
        oid = hashlib.sha1(json.dumps([message, len(self.commits)]).encode()).hexdigest()
        self.commits[oid], self.refs["main"] = files, oid
        return oid

    def resolve(self, revision):
        return revision if revision in self.commits else self.refs.get(revision)


@contextlib.contextmanager
def hub():
    """A `Hub`, and its address."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status, content=b"", **headers):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            headers.setdefault("Content_Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status, code):
            self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

        def repository(self, name):
            """The repository, if whoever asks may see it."""
            found = state.repositories.get(name)
            if found is None or (found.private and not self.may_write):
                return self.refuse(401, "RepoNotFound")
            if name in state.gated and not self.may_write:
                return self.refuse(403, "GatedRepo")
            return found

        def handle_any(self):
            self.may_write = self.headers.get("Authorization") == f"Bearer {state.token}"
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(self.path.partition("?")[0])
            for pattern, does in ROUTES.items():
                if found := re.fullmatch(pattern, path):
                    return does(self, *found.groups())
            return self.refuse(404, f"no such path: {path}")

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

        def create(self):
            asked = json.loads(self.body)
            if not self.may_write:
                return self.refuse(401, "InvalidToken")
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] == "others":
                return self.refuse(403, "NotYours")
            if name in state.repositories:
                return self.answer(409, {"error": "You already created this model repo", "url": f"{address}/{name}"})
            state.repositories[name] = Repository(asked.get("visibility") == "private")
            return self.answer(200, {"url": f"{address}/{name}"})

        def check_card(self):
            return self.answer(200, {"errors": [], "warnings": []})

        def info(self, name, revision="main"):
            if found := self.repository(name):
                if (oid := found.resolve(revision)) is None:
                    return self.refuse(404, "RevisionNotFound")
                siblings = [{"rfilename": file} for file in found.commits[oid]]
                self.answer(200, {"id": name, "sha": oid, "private": found.private, "siblings": siblings})
            return None

        def tree(self, name, revision):
            if found := self.repository(name):
                files = found.commits[found.resolve(revision)]
                rows = [{"type": "file", "path": file, "size": len(data), "oid": etag(data)} for file, data in files.items()]
                self.answer(200, rows)

        def preupload(self, name, revision):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self.answer(200, {"files": modes})

        def batch(self, name):
            rows = [
                {**one, "actions": {"upload": {"href": f"{address}/objects/{one['oid']}"}}}
                for one in json.loads(self.body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": rows})

        def put(self, oid):
            assert hashlib.sha256(self.body).hexdigest() == oid
            state.objects[oid] = self.body
            state.uploaded.append(len(self.body))
            self.answer(200)

        def commit(self, name, revision):
            if not (found := self.repository(name)):
                return
            lines = [json.loads(line) for line in self.body.splitlines()]
            files = dict(found.commits[found.resolve(revision)])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = state.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            oid = found.commit(files, lines[0]["value"]["summary"])
            self.answer(200, {"commitUrl": f"{address}/{name}/commit/{oid}", "commitOid": oid})

        def file(self, name, revision, file):
            if found := self.repository(name):
                if (oid := found.resolve(revision)) is None:
                    self.refuse(404, "RevisionNotFound")
                elif (data := found.commits[oid].get(file)) is None:
                    self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
                else:
                    self.answer(200, data, ETag=f'"{etag(data)}"', X_Repo_Commit=oid)

        def log_message(self, *args):
            """Quiet."""

    name = "([^/]+/[^/]+)"
    ROUTES = {
        "/api/repos/create": Handler.create,
        "/api/validate-yaml": Handler.check_card,
        f"/api/models/{name}": Handler.info,
        f"/api/models/{name}/revision/(.+)": Handler.info,
        f"/api/models/{name}/tree/(.+)": Handler.tree,
        f"/api/models/{name}/preupload/(.+)": Handler.preupload,
        f"/api/models/{name}/commit/(.+)": Handler.commit,
        rf"/{name}\.git/info/lfs/objects/batch": Handler.batch,
        "/objects/(.+)": Handler.put,
        f"/{name}/resolve/([^/]+)/(.+)": Handler.file,
    }
    with serving(Handler) as address:
        yield state, address


def etag(data):
    return hashlib.sha1(data).hexdigest()
