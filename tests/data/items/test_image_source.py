"""Images from files, bytes, data URLs and a real HTTP server."""

import base64
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from data.items import image_source
from data.items.conversation import ItemError
from data.items.image_source import ImageReader


def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), (200, 30, 30)).save(buffer, format)
    return buffer.getvalue()


PNG, EPS = encoded("PNG"), encoded("EPS")


@pytest.fixture
def folders(tmp_path):
    """`one` and `two`; the second has `a.png`, and a link in the first leads there."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "two" / "a.png").write_bytes(PNG)
    (tmp_path / "one" / "link.png").symlink_to(tmp_path / "two" / "a.png")
    return tmp_path / "one", tmp_path / "two"


@pytest.mark.parametrize(
    "source",
    [
        "a.png",
        PNG,
        {"bytes": PNG, "path": None},
        {"bytes": None, "path": "a.png"},
        "data:image/png;base64," + base64.b64encode(PNG).decode(),
        "data:;base64," + base64.encodebytes(PNG).decode(),
    ],
)
def test_every_source_gives_the_image(folders, source):
    assert ImageReader(folders).open(source).size == (40, 20)


@pytest.mark.parametrize(
    "source, reason",
    [
        ("b.png", r"image b\.png does not exist .*one.*two.*--image_root"),
        ("data:image/png;base64,ab*d" + "x" * 10**6, "no base64 data URL"),
        ("data:image/png,xx", "must begin with data:image/...;base64,"),
        ("data:;base64,", "it is empty"),
        (PNG[:60], "image of 60 bytes cannot be read"),
        (EPS, "cannot be read: EPS is read from files alone"),
        ("https://a.b/" + "c" * 999, "is a URL: give --allow_urls"),
        ("s3://bucket/a.png", "s3 is not read"),
        ("file:///etc/passwd", "file is not read"),
    ],
)
def test_what_is_no_image_is_rejected_in_few_words(folders, source, reason):
    with pytest.raises(ItemError, match=reason) as caught:
        ImageReader(folders).open(source)
    assert len(str(caught.value)) < 400


def test_images_are_looked_for_in_order(folders):
    reader = ImageReader(folders)
    assert reader.find("a.png") == reader.find(str(folders[1] / "a.png")) == folders[1] / "a.png"
    (folders[0] / "a.png").write_bytes(PNG)
    assert reader.find("a.png") == folders[0] / "a.png"


def test_confined_paths_stay_in_the_first_folder(folders):
    reader = ImageReader(folders, is_confined=True)
    (folders[0] / "in.png").write_bytes(PNG)
    assert reader.open("in.png").size == reader.open(str(folders[0] / "in.png")).size == (40, 20)
    for path in ("../two/a.png", str(folders[1] / "a.png"), "link.png", {"bytes": None, "path": "../two/a.png"}):
        with pytest.raises(ItemError, match="leads out of .*one, which --confine_images rejects"):
            reader.open(path)
    with pytest.raises(ItemError, match=r"a\.png does not exist"):
        reader.open("a.png")


class Handler(BaseHTTPRequestHandler):
    """`/ok`, `/flaky` (503 at first), `/cut`, `/slow`, `/to?URL` (a redirect); all else is missing."""

    calls: dict[str, int] = {}

    def do_GET(self):
        path, _, target = self.path.partition("?")
        self.calls[path] = self.calls.get(path, 0) + 1
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
        elif path == "/slow":
            self.server.is_over.wait(20)
        elif path not in ("/ok", "/flaky", "/cut", "/a%20b.png"):
            self.send_error(404)
        elif path == "/flaky" and self.calls[path] == 1:
            self.send_error(503)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(PNG)))
            self.end_headers()
            self.wfile.write(PNG[:50] if path == "/cut" else PNG)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.is_over = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.is_over.set()
    server.shutdown()


@pytest.fixture
def urls(monkeypatch):
    monkeypatch.setattr(image_source, "RETRY_WAIT_S", 0.0)
    Handler.calls.clear()
    return ImageReader(("",), allows_urls=True)


def test_urls_are_fetched_and_errors_that_may_pass_tried_again(server, urls):
    for path, tries in (("/ok", 1), ("/flaky", 2), ("/a b.png", 1)):
        assert urls.open(server + path).size == (40, 20)
        assert Handler.calls[path.replace(" ", "%20")] == tries


@pytest.mark.parametrize(
    "path, reason, tries",
    [
        ("/gone", "cannot be fetched: HTTP 404", 1),
        ("/cut", "cannot be fetched: .*IncompleteRead", 3),
        ("/slow", "cannot be fetched: .*timed out", 3),
        ("/to?/ok", "is redirected to http://127.*which is a private address", 1),
        ("/to?http://localhost/ok", "is redirected to http://localhost/ok, which is a private address", 1),
        ("/to?http://169.254.169.254/latest", "which is a private address", 1),
        ("/to?http://[64:ff9b::a9fe:a9fe]/latest", "which is a private address", 1),
        ("/to?ftp://example.org/a.png", "which is no http.s. address", 1),
        ("/to?file:///etc/passwd", "not allowed", 1),
    ],
)
def test_urls_that_fail_are_rejected_by_name(server, urls, monkeypatch, path, reason, tries):
    monkeypatch.setattr(image_source, "SILENCE_S", 0.2)
    with pytest.raises(ItemError, match=f"image http://127.*{reason}") as caught:
        urls.open(server + path)
    assert Handler.calls[path.partition("?")[0]] == tries and len(str(caught.value)) < 400


def test_an_image_from_a_url_has_a_bound(server, urls, monkeypatch):
    monkeypatch.setattr(image_source, "MAX_BYTES", 50)
    with pytest.raises(ItemError, match="/ok has more than 0 MiB"):
        urls.open(f"{server}/ok")
    with pytest.raises(ItemError, match="cannot be fetched"):
        urls.open("http://[half/a.png")
