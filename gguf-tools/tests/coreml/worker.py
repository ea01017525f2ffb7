"""Drives a directory of packages as docs/COREML.md tells a worker to: sessions, chunks, padding, rewinds."""

import hashlib
import json
from pathlib import Path

import numpy as np

from evaluator import Program
from mlpackage import require


class PackageSet:
    """The packages of a directory, their manifest and files checked."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.manifest = m = json.loads((self.directory / "manifest.json").read_text())
        require(m["format"] == "dim.coreml" and m["version"] == 1, "manifest.json: format or version")
        names = {"manifest.json"} | {p["directory"] for p in m["packages"]} | ({"selftest.bin"} if m["selftest"] else set())
        require({p.name for p in self.directory.iterdir()} == names, "files that the manifest does not name, or none")
        self.programs = []
        next_block = m["slice"]["first_block"]
        for p in m["packages"]:
            root = self.directory / p["directory"]
            for f in p["files"]:
                data = (root / f["path"]).read_bytes()
                require(len(data) == f["bytes"], f"{f['path']}: {len(data)} bytes")
                require(hashlib.sha256(data).hexdigest() == f["sha256"], f"{f['path']}: another SHA-256")
            program = Program(root)
            require(p["first_block"] == next_block, f"{p['directory']} starts at block {p['first_block']}")
            next_block = p["last_block"] + 1
            require(list(program.states["kv"].dims) == p["state_shape"], f"{p['directory']}: shape of the state")
            blobs = {record + 64: blob for record, blob in program.package.blobs.at.items()}
            require(set(blobs) == {w["offset"] for w in p["weights"]}, f"{p['directory']}: weights in the manifest")
            for w in p["weights"]:
                require(w["bytes"] == 2 * np.prod(w["shape"]) == blobs[w["offset"]].nbytes, f"{w['name']}: bytes")
            self.programs.append(program)
        require(next_block == m["slice"]["last_block"] + 1, "the packages do not cover the slice")

    def selftest_rows(self, dtype):
        """Per boundary, rows (n_rows, n_embd) of selftest.bin."""
        test = self.manifest["selftest"]
        data = (self.directory / test["file"]).read_bytes()
        require(hashlib.sha256(data).hexdigest() == test["sha256"], "selftest.bin: another SHA-256")
        n_rows, n_embd = test["n_rows"], self.manifest["dims"]["n_embd"]
        key, kind = {"f16": ("f16_offset", "<f2"), "f32": ("f32_offset", "<f4")}[dtype]
        read = lambda offset: np.frombuffer(data, kind, n_rows * n_embd, offset).reshape(n_rows, n_embd)
        return [read(b[key]) for b in test["boundaries"]]


class Session:
    """One sequence: a state per package, and the position."""

    def __init__(self, packages, mode):
        self.packages, self.mode = packages, mode
        self.states = [program.new_state() for program in packages.programs]
        self.position = 0

    def rewind(self, position):
        require(position <= self.position, "rewind forwards")
        self.position = position

    def feed(self, rows):
        """rows (n, n_embd), the model's values -> rows after the last package, (n, n_embd)"""
        m = self.packages.manifest
        n_prefill, n_ctx, scale = m["n_prefill"], m["n_ctx"], m["residual_scale"]
        rows = (rows * scale).astype(np.float16)
        require(self.position + len(rows) <= n_ctx, "more rows than the context has room for")
        out, at = [], 0
        while at < len(rows):
            n = min(n_prefill, len(rows) - at)
            if n == 1 or self.position + n_prefill > n_ctx:
                n, function, chunk = 1, "decode", rows[at : at + 1]
            else:
                copies = np.repeat(rows[at + n - 1 : at + n], n_prefill - n, axis=0)
                function, chunk = "prefill", np.concatenate([rows[at : at + n], copies])
            out.append(self.call(function, chunk)[:n] / scale)
            self.position += n
            at += n
        return np.concatenate(out)

    def call(self, function, chunk):
        inputs = self.inputs(len(chunk))
        hidden = chunk[None]
        for program, state in zip(self.packages.programs, self.states):
            hidden = program.run(function, {"hidden": hidden, **inputs}, state, self.mode)["hidden_out"]
            if self.mode == "fp16":
                hidden = hidden.astype(np.float16)
        return np.float64(hidden[0])

    def inputs(self, n):
        m = self.packages.manifest
        positions = np.arange(self.position, self.position + n)
        angles = positions[:, None] * np.array(m["rope"]["inv_freq"])
        wide = lambda x: (np.concatenate([x, x], 1) * m["rope"]["magnitude"]).astype(np.float16)[None, None]
        mask = np.where(np.arange(m["n_ctx"]) <= positions[:, None], 0, m["mask_value"]).astype(np.float16)[None, None]
        return {"pos": np.array([self.position]), "cos": wide(np.cos(angles)), "sin": wide(np.sin(angles)), "mask": mask}

    def cache(self):
        """Keys and values of every block up to the position: (blocks, 2, n_head_kv, position, head_dim)"""
        parts = [s["kv"].reshape(-1, 2, *s["kv"].shape[1:]) for s in self.states]
        return np.concatenate(parts)[:, :, :, : self.position]
