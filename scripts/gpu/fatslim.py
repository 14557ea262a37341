#!/usr/bin/env python3
"""Drops a CUDA library's machine code for other GPUs: `fatslim.py IN OUT 90` keeps compute capability 9.0 (and 9.0a).

For shipping ONNX Runtime's CUDA provider (284 MB, of which one architecture is 50 MB compressed) to a machine that cannot
download it. Entries that are kept move to the front of their container in `.nv_fatbin`, its size shrinks, and the rest becomes
zeros, which compress to nothing; no offset in the file changes. Containers without code for the architecture stay as they are.
"""

import collections
import struct
import sys
from pathlib import Path

MAGIC = 0xBA55ED50
MACHINE_CODE = 2


def section(data, name):
    """Offset and size of an ELF section."""
    headers, (entry, count, names) = struct.unpack_from("<Q", data, 0x28)[0], struct.unpack_from("<HHH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, headers + i * entry) for i in range(count)]
    for fields in sections:
        start = sections[names][4] + fields[0]
        if data[start : data.index(0, start)] == name:
            return fields[4], fields[5]
    raise SystemExit(f"there is no section {name.decode()}")


def entries(data, start, end):
    """Kind, architecture and bytes of the entries of one container."""
    while start < end:
        kind, _, header, payload = struct.unpack_from("<HHIQ", data, start)
        (arch,) = struct.unpack_from("<I", data, start + 28)
        yield kind, arch, bytes(data[start : start + header + payload])
        start += header + payload


def slim(data, keep):
    at, size = section(data, b".nv_fatbin")
    end, count = at + size, collections.Counter()
    while at < end:
        magic, _, header, length = struct.unpack_from("<IHHQ", data, at)
        if magic != MAGIC:
            at += 8
            continue
        body, after = at + header, at + header + length
        kept = [bytes_ for kind, arch, bytes_ in entries(data, body, after) if kind == MACHINE_CODE and arch in keep]
        if kept:
            joined = b"".join(kept)
            data[body:after] = joined + bytes(length - len(joined))
            struct.pack_into("<Q", data, at + 8, len(joined))
            count["removed bytes"] += length - len(joined)
        count["slimmed" if kept else "left as it was"] += 1
        at = after
    return dict(count)


def main():
    source, target, archs = sys.argv[1:4]
    data = bytearray(Path(source).read_bytes())
    print("fatslim:", slim(data, {int(arch) for arch in archs.split(",")}))
    Path(target).write_bytes(data)


if __name__ == "__main__":
    main()
