"""Where the images of items come from: files, bytes, base64 data URLs and, if allowed, http(s) URLs."""

import base64
import io
import ipaddress
import os
import re
import socket
import string
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from PIL import Image

from data.items.conversation import ImageSource, ItemError
from data.items.image_transform import open_image
from data.messages import MAX_VALUE, one_line

NUM_TRIES = 3
# Before the second try; twice as long before each further one.
RETRY_WAIT_S = 1.0
# Without a byte, and for a whole image.
SILENCE_S, TOTAL_S = 20.0, 120.0
MAX_BYTES = 100 << 20
_SCHEME = re.compile(r"([a-z][a-z\d+.-]+)://", re.IGNORECASE)
# Addresses of IPv6 that stand for one of IPv4, and those of a site; `is_global` passes them.
_PRIVATE_NETWORKS = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "2002::/16", "fec0::/10")))
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class ImageReader:
    """Opens the images of items.

    `folders`: where relative paths are looked for, in this order. With `is_confined` no path may lead out of the first,
    which is then the only one. `allows_urls`: whether http(s) URLs are fetched.
    """

    folders: tuple[str | os.PathLike, ...]
    is_confined: bool = False
    allows_urls: bool = False

    def open(self, source: ImageSource) -> Image.Image:
        """The image, decoded. Raises ItemError with its name and the reason."""
        if isinstance(source, Mapping):
            source = source.get("bytes") or source["path"]
        if isinstance(source, bytes):
            return open_image(io.BytesIO(source), f"image of {len(source):,} bytes")
        name = f"image {one_line(source, MAX_VALUE)}"
        if source[:5].lower() == "data:":
            return open_image(io.BytesIO(_decode(source, name)), name)
        if scheme := _SCHEME.match(source):
            if scheme[1].lower() not in ("http", "https"):
                raise ItemError(f"{name}: {scheme[1]} is not read; give a path, bytes, a data URL or an http(s) URL")
            if not self.allows_urls:
                raise ItemError(f"{name} is a URL: give --allow_urls to fetch it")
            return open_image(io.BytesIO(fetch(source)), name)
        return open_image(self.find(source))

    def find(self, path: str) -> Path:
        """Where an image lies: as given if absolute, else in the first folder that has it. Raises ItemError."""
        name = f"image {one_line(path, MAX_VALUE)}"
        candidates = [Path(folder) / path for folder in self.folders[: 1 if self.is_confined else None]]
        for candidate in candidates:
            # False, too, for what cannot be a path.
            if os.path.isfile(candidate):
                root = os.path.realpath(self.folders[0])
                if self.is_confined and not Path(os.path.realpath(candidate)).is_relative_to(root):
                    raise ItemError(f"{name} leads out of {one_line(self.folders[0])}, which --confine_images rejects")
                return candidate
        tried = ", ".join(dict.fromkeys(one_line(candidate) for candidate in candidates))
        raise ItemError(f"{name} does not exist (looked for {tried}); see --image_root")


def fetch(url: str) -> bytes:
    """What an http(s) URL holds. Errors that may pass are tried again. Raises ItemError."""
    name, reason = f"image {one_line(url, MAX_VALUE)}", ""
    for number in range(NUM_TRIES):
        if number:
            time.sleep(RETRY_WAIT_S * 2 ** (number - 1))
        try:
            return _fetch_once(url, name)
        except HTTPError as error:
            reason = f"HTTP {error.code} {one_line(error.reason)}"
            if error.code < 500 and error.code not in (408, 429):
                break
        # A URL that is none is a ValueError.
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, ItemError):
                raise
            reason = one_line(error) or type(error).__name__
    raise ItemError(f"{name} cannot be fetched: {reason}")


def _fetch_once(url: str, name: str) -> bytes:
    deadline, content = time.monotonic() + TOTAL_S, bytearray()
    request = Request(quote(url, safe=string.punctuation), headers={"User-Agent": "Mozilla/5.0 (pre_tokenize.py)"})
    with build_opener(_CheckedRedirects).open(request, timeout=SILENCE_S) as response:
        while chunk := response.read1(1 << 16):
            content += chunk
            if len(content) > MAX_BYTES:
                raise ItemError(f"{name} has more than {MAX_BYTES >> 20} MiB")
            if time.monotonic() > deadline:
                raise TimeoutError(f"it takes longer than {TOTAL_S:.0f} s")
        # What is missing of the announced length.
        if response.length:
            raise IncompleteRead(bytes(content), response.length)
    return bytes(content)


class _CheckedRedirects(HTTPRedirectHandler):
    """An item may name any address, also of an own server; a foreign server may send nobody to a private one."""

    max_redirections = 5

    def redirect_request(self, request, response, code, reason, headers, new_url):
        parts = urlsplit(new_url)
        where = f"image {one_line(request.full_url, MAX_VALUE)} is redirected to {one_line(new_url, MAX_VALUE)}"
        if parts.scheme not in ("http", "https"):
            raise ItemError(f"{where}, which is no http(s) address")
        addresses = {found[4][0].partition("%")[0] for found in socket.getaddrinfo(parts.hostname, None)}
        if not all(map(_is_public, map(ipaddress.ip_address, addresses))):
            raise ItemError(f"{where}, which is a private address")
        return super().redirect_request(request, response, code, reason, headers, new_url)


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_global and not any(address in network for network in _PRIVATE_NETWORKS)


def _decode(url: str, name: str) -> bytes:
    try:
        if not (head := _DATA_URL.match(url)):
            raise ValueError("it must begin with data:image/...;base64,")
        return base64.b64decode("".join(url[head.end() :].split()), validate=True)
    except ValueError as error:
        raise ItemError(f"{name} is no base64 data URL: {one_line(error)}") from None
