"""Small ICC profiles (ICC.1:2001-04, version 2) for images of the tests: matrices, a grey curve, and a press with one ink."""

import struct
from collections.abc import Sequence

ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
"""X, Y, Z of red, green and blue, adapted to D50 (Adobe RGB 1998, annex C)."""

SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
"""The same of sRGB (IEC 61966-2-1)."""

D50 = (0.9642, 1.0, 0.8249)


def matrix_profile(colorants: Sequence[Sequence[float]], gamma: float) -> bytes:
    """A profile of RGB colours: XYZ of its three primaries and one gamma."""
    tags = {b"wtpt": _xyz(D50)}
    for name, colorant in zip((b"r", b"g", b"b"), colorants, strict=True):
        tags |= {name + b"XYZ": _xyz(colorant), name + b"TRC": _gamma(gamma)}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    """A profile of greys."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": _xyz(D50), b"kTRC": _gamma(gamma)})


def black_ink_profile() -> bytes:
    """A profile of CMYK colours of a press that prints black only: cyan, magenta and yellow leave the paper white."""
    table = b"".join(bytes([0 if corner & 1 else 255, 128, 128]) for corner in range(16))  # L, a, b; black changes fastest
    identity = bytes(range(256))
    body = struct.pack(">4sI4B9i", b"mft1", 0, 4, 3, 2, 0, *(65536 if n % 4 == 0 else 0 for n in range(9)))
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": _xyz(D50), b"A2B0": body + identity * 4 + table + identity * 3})


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"desc": _text(b"desc"), b"cprt": _text(b"text"), **tags}
    start = 128 + 4 + 12 * len(tags)
    directory, data = struct.pack(">I", len(tags)), b""
    for name, body in tags.items():
        directory += struct.pack(">4sII", name, start + len(data), len(body))
        data += body + b"\0" * (-len(body) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s", start + len(data), 0x02400000, kind, space, connection, b"acsp").ljust(68, b"\0")
    return (head + _numbers(D50)).ljust(128, b"\0") + directory + data


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + _numbers(values)


def _gamma(gamma: float) -> bytes:
    return struct.pack(">4sIIH", b"curv", 0, 1, round(gamma * 256))


def _text(kind: bytes) -> bytes:
    words = b"made by a test\0"
    return kind + bytes(4) + (struct.pack(">I", len(words)) + words + bytes(78) if kind == b"desc" else words)


def _numbers(values: Sequence[float]) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))
