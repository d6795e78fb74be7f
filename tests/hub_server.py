"""A Hugging Face Hub on 127.0.0.1, in memory, for tests: repositories, uploads, commits, branches, downloads, collections.

    def test_it(hub):
        run_python("from huggingface_hub import HfApi; HfApi().create_repo('me/model')", hub)
        assert hub.files("me/model")

`HF_ENDPOINT` counts only if it is set before huggingface_hub is imported, so code that talks to the server runs in a
child process; `run_python` starts one, and can make packages unimportable in it.
"""

import base64
import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import pytest

from tests import warm

USER = "me"
LFS_SUFFIXES = (".safetensors", ".bin", ".png")


@dataclass
class File:
    data: bytes
    lfs: bool

    @cached_property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def oid(self):
        """Git blob id, of the pointer for an LFS file."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        content = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, path):
        lfs = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        plain = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        return plain | ({"lfs": lfs} if self.lfs else {})


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, File]


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch, title, files):
        parent = self.refs.get(branch)
        oid = hashlib.sha1(f"{parent} {title} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, files)
        self.refs[branch] = oid
        return oid

    def at(self, revision):
        return self.commits.get(self.refs.get(revision, revision))

    def split(self, rest):
        """Split "main/a/b.txt" into the commit and "a/b.txt"; a branch name may contain slashes."""
        for name in sorted([*self.refs, *self.commits], key=len, reverse=True):
            if rest == name or rest.startswith(f"{name}/"):
                return self.at(name), rest[len(name) + 1 :]
        return None, ""


class Hub:
    """State of the server, what was asked of it: `log` holds (method, path, status), and the bytes of files it `sent`."""

    def __init__(self, url):
        self.url, self.repositories, self.objects, self.log, self.sent = url, {}, {}, [], {}
        self.collections = {}  # what GET returns, by slug
        self.lock = threading.Lock()

    def files(self, repo_id, revision="main"):
        return {path: file.data for path, file in self.repositories[repo_id].at(revision).files.items()}

    def history(self, repo_id, revision="main"):
        """Titles of the commits, newest first."""
        repository, titles = self.repositories[repo_id], []
        commit = repository.at(revision)
        while commit:
            titles.append(commit.title)
            commit = repository.commits.get(commit.parent)
        return titles


class Refusal(Exception):
    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_any(self):
        length = self.headers.get("Content-Length")
        self.body = self.rfile.read(int(length)) if length else self.read_chunks()
        path = unquote(urlparse(self.path).path)
        with self.hub.lock:
            try:
                for method, pattern, action in ROUTES:
                    if self.command in method.split("|") and (match := re.fullmatch(pattern, path)):
                        return action(self, *match.groups())
                raise Refusal(404, f"no route for {self.command} {path}")
            except Refusal as refusal:
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)} if refusal.code else {}
                return self.reply({"error": str(refusal)}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_any

    def read_chunks(self):
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def json(self):
        return json.loads(self.body or b"{}")

    def reply(self, payload, status=200, headers=None, length=None):
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.hub.log.append((self.command, self.path, status))
        self.send_response(status)
        default = {"Content-Type": "application/octet-stream" if data is payload else "application/json"}
        for key, value in {
            **default,
            **(headers or {}),
            "Content-Length": len(data) if length is None else length,
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            if "/resolve/" in self.path and status < 300:
                self.hub.sent[self.path] = self.hub.sent.get(self.path, 0) + len(data)
            self.wfile.write(data)

    def repository(self, repo_id):
        if repo_id not in self.hub.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.hub.repositories[repo_id]

    def commit_at(self, repo_id, revision):
        commit = self.repository(repo_id).at(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # -- Repositories --------------------------------------------------------------------------------------------------

    def whoami(self):
        self.reply({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self):
        self.reply({"errors": [], "warnings": []})

    def create_repository(self):
        request = self.json()
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repositories:
            return self.reply(answer | {"error": "You already created this model repo"}, 409)
        repository = self.hub.repositories[repo_id] = Repository(
            bool(request.get("private") or request.get("visibility") == "private")
        )
        repository.commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", lfs=False)})
        return self.reply(answer)

    def delete_repository(self):
        request = self.json()
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        self.repository(repo_id)
        del self.hub.repositories[repo_id]
        self.reply({})

    def create_ref(self, repo_id, kind, name):
        repository, request = self.repository(repo_id), self.json()
        start = request.get("startingPoint", "main") if kind == "branch" else name
        name = name if kind == "branch" else request["tag"]
        if name in repository.refs:
            raise Refusal(409, "Reference already exists")
        repository.refs[name] = self.commit_at(repo_id, start).oid
        self.reply({})

    def list_refs(self, repo_id):
        refs = [
            {"name": n, "ref": f"refs/heads/{n}", "targetCommit": o} for n, o in self.repository(repo_id).refs.items()
        ]
        self.reply({"branches": refs, "tags": [], "converts": []})

    def info(self, repo_id, revision):
        commit = self.commit_at(repo_id, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self.reply(
            {"_id": "1", "id": repo_id, "modelId": repo_id, "sha": commit.oid, "siblings": siblings, "tags": []}
            | {"private": self.repository(repo_id).private, "gated": False, "disabled": False}
        )

    def tree(self, repo_id, rest):
        commit, folder = self.repository(repo_id).split(rest)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {rest}", "RevisionNotFound")
        inside = sorted(path for path in commit.files if path.startswith(f"{folder}/" if folder else ""))
        self.reply([commit.files[path].entry(path) for path in inside])

    def paths_info(self, repo_id, revision):
        form = b"paths=" in self.body
        paths = (parse_qs(self.body.decode()) if form else self.json())["paths"]
        files = self.commit_at(repo_id, revision).files
        self.reply([files[path].entry(path) for path in paths if path in files])

    def list_commits(self, repo_id, revision):
        commit, found = self.commit_at(repo_id, revision), []
        while commit:
            found.append({"id": commit.oid, "title": commit.title, "message": "", "authors": [{"user": USER}]})
            found[-1]["date"] = "2026-01-01T00:00:00.000Z"
            commit = self.repository(repo_id).commits.get(commit.parent)
        self.reply(found)

    # -- Uploads -------------------------------------------------------------------------------------------------------

    def preupload(self, repo_id, revision):
        files = self.commit_at(repo_id, revision).files
        self.reply(
            {
                "files": [
                    {
                        "path": item["path"],
                        "uploadMode": "lfs" if item["path"].endswith(LFS_SUFFIXES) else "regular",
                        "shouldIgnore": False,
                        "oid": files[item["path"]].oid if item["path"] in files else None,
                    }
                    for item in self.json()["files"]
                ]
            }
        )

    def lfs_batch(self, repo_id):
        self.repository(repo_id)
        objects = []
        for item in self.json()["objects"]:
            upload, verify = f"{self.hub.url}/lfs/{item['oid']}", f"{self.hub.url}/lfs/verify"
            missing = item["oid"] not in self.hub.objects  # what is stored already is not uploaded again
            actions = {"upload": {"href": upload, "header": {}}, "verify": {"href": verify, "header": {}}}
            objects.append({"oid": item["oid"], "size": item["size"]} | ({"actions": actions} if missing else {}))
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(422, "sha256 differs")
        self.hub.objects[oid] = self.body
        self.reply(b"")

    def lfs_verify(self):
        request = self.json()
        if len(self.hub.objects.get(request["oid"], b"")) != request["size"]:
            raise Refusal(422, "not uploaded")
        self.reply({})

    def make_commit(self, repo_id, branch):
        repository = self.repository(repo_id)
        files, title = dict(self.commit_at(repo_id, branch).files), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", repository.refs[branch]) != repository.refs[branch]:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                files[value["path"]] = File(self.hub.objects[value["oid"]], lfs=True)
            elif key == "deletedFile":
                files.pop(value["path"], None)
            else:
                raise Refusal(400, f"unknown operation {key}")
        oid = repository.commit(branch, title, files)
        url = f"{self.hub.url}/{repo_id}/commit/{oid}"
        self.reply({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    # -- Collections ---------------------------------------------------------------------------------------------------

    def create_collection(self):
        request = self.json()
        title, owner = request["title"], request["namespace"]
        if owner != USER:
            raise Refusal(403, f"You don't have the rights to create a collection under the namespace {owner!r}")
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        slug = f"{owner}/{name}-{hashlib.sha1(title.encode()).hexdigest()[:24]}"
        if slug in self.hub.collections:
            return self.reply({"error": "This collection already exists", "slug": slug}, 409)
        self.hub.collections[slug] = {"slug": slug, "title": title, "owner": {"name": owner}, "items": []} | {
            "lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "private": request["private"],
            "theme": "green", "upvotes": 0,
        }  # fmt: skip
        self.reply(self.hub.collections[slug])

    def collection(self, slug):
        if slug not in self.hub.collections:
            raise Refusal(404, "Collection not found")
        return self.hub.collections[slug]

    def get_collection(self, slug):
        self.reply(self.collection(slug))

    def add_collection_item(self, slug):
        collection, item = self.collection(slug), self.json()["item"]
        self.repository(item["id"])
        if any(known["id"] == item["id"] for known in collection["items"]):
            raise Refusal(409, "The item is already in the collection")
        position = len(collection["items"])
        collection["items"].append({**item, "_id": f"{position:024x}", "position": position})
        self.reply(collection)

    # -- Downloads -----------------------------------------------------------------------------------------------------

    def resolve(self, repo_id, rest):
        commit, path = self.repository(repo_id).split(rest)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {rest}", "RevisionNotFound")
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.reply({"error": "Entry not found"}, 404, headers)
        file = commit.files[path]
        data = file.data
        headers["ETag"] = f'"{file.sha256 if file.lfs else file.oid}"'
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": len(data)}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.reply(data[start : end + 1], 206, headers)
        return self.reply(data, 200, headers, length=len(data))


REPO, KIND = r"([^/]+/[^/]+)", "(?:models|spaces)"
ROUTES = (
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", r"/api/repos/create", Handler.create_repository),
    ("DELETE", r"/api/repos/delete", Handler.delete_repository),
    ("GET", rf"/api/{KIND}/{REPO}(?:/revision/(.+))?", Handler.info),
    ("GET", rf"/api/{KIND}/{REPO}/refs", Handler.list_refs),
    ("POST", rf"/api/{KIND}/{REPO}/(branch|tag)/(.+)", Handler.create_ref),
    ("GET", rf"/api/{KIND}/{REPO}/tree/(.+)", Handler.tree),
    ("POST", rf"/api/{KIND}/{REPO}/paths-info/(.+)", Handler.paths_info),
    ("GET", rf"/api/{KIND}/{REPO}/commits/(.+)", Handler.list_commits),
    ("POST", rf"/api/{KIND}/{REPO}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/api/{KIND}/{REPO}/commit/(.+)", Handler.make_commit),
    ("POST", r"/api/collections", Handler.create_collection),
    ("GET", rf"/api/collections/{REPO}", Handler.get_collection),
    ("POST", rf"/api/collections/{REPO}/items", Handler.add_collection_item),
    ("POST", rf"/(?:spaces/)?{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", r"/lfs/verify", Handler.lfs_verify),
    ("PUT", r"/lfs/(\w+)", Handler.lfs_put),
    ("GET|HEAD", rf"/(?:spaces/)?{REPO}/(?:resolve|raw)/(.+)", Handler.resolve),
)


@contextmanager
def serve(home):
    """Run a Hub without repositories; `home` is the HF_HOME of its clients."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {}))
    hub = server.RequestHandlerClass.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    hub.home = home
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(tmp_path):
    """A running Hub, new for each test; its clients share one cache, which is empty at first."""
    with serve(tmp_path / "hf_home") as running:
        yield running


BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked by the test)", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run_python(code, hub=None, *, home=None, env=None, block=(), cwd=None):
    """Run code in a Python of its own against a hub, or offline without one.

    Args:
        code (`str`): the program.
        hub (`Hub`, *optional*): what `HF_ENDPOINT` points to.
        home (`Path`, *optional*): HF_HOME; the hub's own by default. A new folder is an empty cache.
        env (`dict`, *optional*): further environment variables.
        block (`tuple[str, ...]`): packages that cannot be imported.
        cwd (`Path`, *optional*): working directory.

    Returns:
        `str`: what it printed on stdout.
    """
    home = Path(home or hub.home)
    home.mkdir(parents=True, exist_ok=True)
    prefix = BLOCKER.format(names=set(block)) if block else ""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "dummy"} if hub else {"HF_HUB_OFFLINE": "1"}
    settings = {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # xet has its own protocol, which this server does not speak
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (root := Path(__file__).parent.parent, root / "examples"))),
        "NO_PROXY": "127.0.0.1",
    }
    env = clean | online | settings | (env or {})
    done = warm.run(prefix + code, env=env, cwd=cwd or home, absent=block)
    assert done.returncode == 0, f"the child failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout
