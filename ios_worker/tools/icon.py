"""Draws the app's icon: a stack of three blocks, the middle one moved aside to another device.

    icon.py [FILE]     App/DIMWorker/Assets.xcassets/AppIcon.appiconset/icon.png unless said otherwise

1024 x 1024, RGB without an alpha channel (the system cuts the corners, and an icon with alpha is refused). The same bytes
on every run.
"""

import pathlib
import struct
import sys
import zlib

SIZE = 1024
BACKGROUND = (16, 24, 48)
# left, top, right, bottom, colour
BLOCKS = [
    (172, 200, 692, 376, (150, 170, 214)),
    (332, 424, 852, 600, (255, 176, 58)),
    (172, 648, 692, 824, (150, 170, 214)),
]
RADIUS = 44


def coverage(x, y, left, top, right, bottom):
    """How much of the pixel at x, y lies in the rounded rectangle, from its distance to the edge."""
    dx = max(left + RADIUS - x, 0, x - (right - RADIUS))
    dy = max(top + RADIUS - y, 0, y - (bottom - RADIUS))
    return min(1.0, max(0.0, RADIUS - (dx * dx + dy * dy) ** 0.5 + 0.5))


def pixels():
    """Lines of the image, each with PNG's filter byte 0 before it."""
    for y in range(SIZE):
        line = bytearray(1)
        inside = [block for block in BLOCKS if block[1] - 1 <= y <= block[3] + 1]
        for x in range(SIZE):
            colour = BACKGROUND
            for left, top, right, bottom, ink in inside:
                part = coverage(x + 0.5, y + 0.5, left, top, right, bottom)
                colour = tuple(round(a + (b - a) * part) for a, b in zip(colour, ink))
            line += bytes(colour)
        yield bytes(line)


def png():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", SIZE, SIZE, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(pixels()), 9)) + \
        chunk(b"IEND", b"")


if __name__ == "__main__":
    place = pathlib.Path(__file__).resolve().parent.parent / "App/DIMWorker/Assets.xcassets/AppIcon.appiconset/icon.png"
    pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else place).write_bytes(png())
