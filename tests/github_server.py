"""GitHub on 127.0.0.1, for `hf extensions install`: an HTTPS proxy that answers for github.com with a certificate of its own.

    with serve({"me/hf-lop": Path("checkout")}, tmp_path) as github:
        subprocess.run(["hf", "extensions", "install", "me/hf-lop"], env=os.environ | github.env)

Clients are pointed to it by the environment variables that every HTTPS client reads; no code of theirs is changed.
"""

import io
import ssl
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import trustme

HOSTS = ("github.com", "raw.githubusercontent.com")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What the wheel is built from; the rest of a checkout makes no difference to an installation.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "hf_lop", "hub_cards")


def archive(root):
    """The zip file that GitHub makes of a repository: everything in one folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for source in SOURCES:
            for path in sorted((root / source).rglob("*")) if (root / source).is_dir() else [root / source]:
                if path.is_file() and "__pycache__" not in path.parts:
                    file.write(path, f"hf-lop-{COMMIT}/{path.relative_to(root)}")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    host = None

    def log_message(self, *args):
        pass

    def do_CONNECT(self):
        host = self.path.split(":")[0]
        if host not in HOSTS:
            self.server.log.append(f"refused {host}")
            return self.send_error(403, "not here")
        self.send_response(200)
        self.end_headers()
        self.host, self.connection = host, self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb")
        self.close_connection = False

    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.log.append(f"{self.command} {self.host}{path}")
        body = self.find(*path.strip("/").split("/", 2))
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        if path.endswith(".zip"):
            self.send_header("Content-Type", "application/zip")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")
            self.wfile.flush()

    do_HEAD = do_GET

    def find(self, owner, name, rest=""):
        root = self.server.repositories.get(f"{owner}/{name.removesuffix('.git')}")
        if root is None:
            return None
        if self.host == "raw.githubusercontent.com":
            file = root / rest.removeprefix("HEAD/")
            return file.read_bytes() if file.is_file() else None
        if rest == "archive/HEAD.zip":
            return archive(root)
        if rest == "info/refs":
            return f"001e# service=git-upload-pack\n0000010c{COMMIT} HEAD\0multi_ack\n".encode()
        return b"<html></html>" if not rest else None


@contextmanager
def serve(repositories, folder):
    """Run it for some repositories, {"owner/name": checkout}; `log` has the requests, `env` what points clients to it."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(Path(folder) / "ca.pem"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories, server.log = repositories, []
    server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*HOSTS).configure_cert(server.tls)
    proxy, certificate = f"http://127.0.0.1:{server.server_port}", str(Path(folder) / "ca.pem")
    server.env = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), proxy) | dict.fromkeys(("NO_PROXY", "no_proxy"), "")
    server.env |= dict.fromkeys(("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), certificate)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
