"""What a file really is that was given in place of weights. Only a file that is cut short is worth fetching again."""

from __future__ import annotations

_MAGIC = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; git lfs pull fetches it",
    b"GGUF": "a GGUF file, which fastsd does not read; give .safetensors",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"PK\x03\x04": "a zip that holds no checkpoint; unpack it",
    b"\x89PNG": "a PNG image, not weights",
    b"\xff\xd8\xff": "a JPEG image, not weights",
    b"RIFF": "a WebP image or another RIFF file, not weights",
    b"\x89HDF": "an HDF5 file, which fastsd does not read; give .safetensors",
    b"\x93NUMPY": "a NumPy array, which fastsd does not read; give .safetensors",
    b"%PDF": "a PDF, not weights",
}
_WEB = (b"<!doct", b"<html", b"<head", b"<?xml", b"<script")


def what_it_is(start: bytes) -> str:
    """What a file that begins so is, with what to do about it; "" if it could be anything.

    Args:
        start: its first bytes, 32 or more if it has as many.
    """
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            return kind
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(_WEB):
        return "a web page, not the file; its download may need a login"
    return "JSON text, such as an answer of a server, not weights" if text.startswith((b"{", b"[")) else ""
