"""A small stand-in of the hub's HTTP API on the loopback address, as far as huggingface_hub uses it to make a
repository, upload files as one commit, check a card's YAML and download a file at a revision.
"""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

OWNER, WRITES, READS = "someone", "hf_writes", "hf_reads"  # the user, and two tokens of theirs


class Hub:
    """What the hub holds: repository → ``{"private", "commits": [(hash, message, {file: bytes})]}``; ``large`` what was
    uploaded beside commits, by SHA-256; ``asked`` each request's method and path; ``broken`` path part → status to
    answer there, None to hang up.
    """

    def __init__(self):
        self.repositories, self.large, self.asked, self.broken = {}, {}, [], {}

    def files(self, repo_id, revision="main"):
        commits = self.repositories[repo_id]["commits"]
        found = [files for number, (oid, _, files) in enumerate(commits, 1) if revision == oid]
        return commits[-1][2] if revision == "main" else found[0]

    def commit(self, repo_id, message, added):
        commits = self.repositories[repo_id]["commits"]
        files = (commits[-1][2] if commits else {}) | added
        oid = hashlib.sha1(f"{len(commits)}{message}".encode()).hexdigest()
        commits.append((oid, message, files))
        return oid


@contextlib.contextmanager
def stand_in(folder):
    """A running :class:`Hub`, and the environment in which commands take it for the hub."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub, {
            "HF_ENDPOINT": address, "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITES,
            "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one(self):
        path = self.path.partition("?")[0]
        self.hub.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for part, status in self.hub.broken.items():
            if part in path and status is None:  # as a network that breaks down
                self.close_connection = True
                return None
            if part in path:
                return self.answer(status, {"error": "it is broken, on purpose"})
        if "/resolve/" in path:
            return self.download(path)
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if path.startswith("/large/"):
            self.hub.large[path.removeprefix("/large/")] = body
            return self.answer(200)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (WRITES, READS):
            return self.answer(401, {"error": "Invalid username or password."})
        if token != WRITES and self.command == "POST":
            return self.answer(403, {"error": "You don't have the rights to create a model"})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        repo_id = path.removeprefix("/api/models/").removeprefix("/").partition(".git/")[0]
        repo_id = "/".join(repo_id.split("/")[:2])
        if repo_id not in self.hub.repositories:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if "/preupload/" in path:
            told = [{"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                     "shouldIgnore": False} for file in json.loads(body)["files"]]  # fmt: skip
            return self.answer(200, {"files": told})
        if path.endswith("/info/lfs/objects/batch"):
            here = f"http://{self.headers['Host']}/large/"
            objects = [one | {"actions": {"upload": {"href": here + one["oid"]}}}
                       for one in json.loads(body)["objects"]]  # fmt: skip
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            return self.commit(repo_id, [json.loads(line) for line in body.splitlines()])
        return self.answer(200, {"id": repo_id, "sha": "0" * 40, "siblings": []})

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def create(self, asked):
        owner = asked.get("organization") or OWNER
        if owner != OWNER:
            return self.answer(403, {"error": f"You don't have the rights to create a model under {owner}"})
        repo_id = f"{owner}/{asked['name']}"
        address = {"url": f"http://{self.headers['Host']}/{repo_id}"}
        if repo_id in self.hub.repositories:
            return self.answer(409, address | {"error": "You already created this model repo"})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[repo_id] = {"private": private, "commits": []}
        return self.answer(200, address)

    def commit(self, repo_id, lines):
        added, message = {}, ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                added[value["path"]] = content
        oid = self.hub.commit(repo_id, message, added)
        url = f"http://{self.headers['Host']}/{repo_id}/commit/{oid}"
        return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def validate(self, content):
        try:
            found = yaml.safe_load(content.split("---\n")[1])
            assert isinstance(found, dict) and found.get("base_model_relation", "adapter") == "adapter"
            return self.answer(200, {"errors": [], "warnings": []})
        except (yaml.YAMLError, IndexError, AssertionError) as error:
            return self.answer(400, {"errors": [{"message": str(error)}], "warnings": []})

    def download(self, path):
        repo_id, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repo_id not in self.hub.repositories:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        commits = [oid for oid, _, _ in self.hub.repositories[repo_id]["commits"]]
        if revision not in ("main", *commits):
            return self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        files, commit = self.hub.files(repo_id, revision), commits[-1] if revision == "main" else revision
        if name not in files:
            return self.answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        tag = hashlib.sha256(files[name]).hexdigest()
        return self.answer(200, files[name], ETag=f'"{tag}"', X_Repo_Commit=commit, X_Linked_Size=len(files[name]))
