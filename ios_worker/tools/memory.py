"""What verifying and pushing a large directory takes of memory, and that a second start does not read it again.

    memory.py BYTES WORKER... [-- DIM-HOST]

Makes a directory of packages whose weight files are BYTES long together, of holes, so that it takes no space; starts
WORKER on it twice with --check; then, with DIM-HOST, pushes it to a worker that starts with an empty directory, and
starts that one's twice. Resident memory may grow by 40 MiB over that of a worker that has done nothing, each time.
On Apple systems the same bytes would be autoreleased objects if they went through Foundation; here that cannot be seen,
and app_rules.py looks for the calls that do so.
"""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

MOST = 40 << 20
PACKAGES = 3


def write_directory(folder, total):
    """A directory that `Manifest.read` takes: three packages of one block each."""
    size = total // PACKAGES
    digest = hashlib.sha256()
    left, hole = size, bytes(1 << 20)
    while left:
        digest.update(hole[:min(left, len(hole))])
        left -= min(left, len(hole))
    packages = []
    for index in range(PACKAGES):
        name = f"middle-{index:02}.mlpackage"
        files = []
        for path, content in [("Manifest.json", b"{}"), ("Data/com.apple.CoreML/model.mlmodel", b"m%d" % index)]:
            place = folder / name / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
            files.append({"path": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
        weights = "Data/com.apple.CoreML/weights/weight.bin"
        place = folder / name / weights
        place.parent.mkdir(parents=True)
        place.touch()
        os.truncate(place, size)
        files.append({"path": weights, "bytes": size, "sha256": digest.hexdigest()})
        packages.append({
            "directory": name, "first_block": 2 + index, "last_block": 2 + index, "state_shape": [2, 2, 64, 8],
            "files": files, "weight_file": weights, "weights": []})
    (folder / "manifest.json").write_text(json.dumps({
        "format": "dim.coreml", "version": 1,
        "model": {"name": "holes", "sha256": "ab" * 32, "arch": "qwen2", "n_blocks": 8},
        "slice": {"first_block": 2, "last_block": 1 + PACKAGES, "sha256": "cd" * 32},
        "dims": {
            "n_embd": 16, "n_head": 4, "n_head_kv": 2, "head_dim": 8, "n_ff": 24, "ffn_bounds": [0, 24],
            "norm_eps": 1e-6, "qk_norm": False},
        "rope": {
            "pairing": "halves", "magnitude": 1, "inv_freq": [1.0, 0.1, 0.01, 0.001], "freq_base": 10000,
            "scaling": "none", "factor": 1, "freq_factors": False},
        "n_ctx": 64, "n_prefill": 16, "mask_value": -10000, "residual_scale": 1, "packages": packages,
        "selftest": None}))


def check(worker, *words):
    """Runs the worker to its end; what it said and the most that was resident."""
    process = subprocess.Popen([*worker, *map(str, words)], stderr=subprocess.PIPE, text=True)
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"error: {' '.join(map(str, words))}: {said}")
    return said, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def twice(worker, directory, idle, what):
    for start, wanted in [(1, "compared with its SHA-256"), (2, "no file has changed")]:
        said, most = check(worker, directory, "--check")
        print(f"{what}, start {start}: {(most - idle) / 2**20:.1f} MiB more than idle; {said.strip()}", flush=True)
        if wanted not in said:
            raise SystemExit(f"error: start {start} said {said!r}")
        if most - idle > MOST:
            raise SystemExit(f"error: {most - idle} bytes of resident growth")


def resident(pid, key):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"error: no {key} of {pid}")


def push(worker, host, directory, folder):
    """Pushes to a worker that has nothing; the growth until it has all."""
    (folder / "key").write_text("7" * 64 + "\n")
    errors = (folder / "worker.err").open("w+")
    process = subprocess.Popen(
        [*worker, "--receive", str(folder / "received"), "--listen", "127.0.0.1:0", "--key-file", str(folder / "key")],
        stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        address = process.stdout.readline().split()[2]
        idle = resident(process.pid, "VmRSS")
        done = subprocess.run(
            [host, "push", str(directory), "--worker", address, "--key-file", str(folder / "key")],
            capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"error: push: {done.stderr}")
        growth = resident(process.pid, "VmHWM") - idle
    finally:
        process.kill()
        process.wait()
    print(f"pushed: {growth / 2**20:.1f} MiB more than idle", flush=True)
    if growth > MOST:
        raise SystemExit(f"error: {growth} bytes of resident growth")
    received = [place for place in (folder / "received").iterdir() if place.name.startswith("middle-")]
    if len(received) != 1:
        raise SystemExit(f"error: received {received}")
    return received[0]


def main():
    words = sys.argv[2:]
    host = words[words.index("--") + 1] if "--" in words else None
    worker = words[:words.index("--")] if "--" in words else words
    with tempfile.TemporaryDirectory(prefix="dim-memory-") as folder:
        folder = pathlib.Path(folder)
        directory = folder / "holes.coreml"
        directory.mkdir()
        write_directory(directory, int(sys.argv[1]))
        _, idle = check(worker, "--version")
        twice(worker, directory, idle, "verified")
        if host:
            received = push(worker, host, directory, folder)
            # the worker that took it may have got as far as verifying it
            (received / "verified.json").unlink(missing_ok=True)
            twice(worker, received, idle, "verified where it was pushed")


if __name__ == "__main__":
    main()
