"""A model cut in three, and the processes that serve it: for the programs here that are clients of `dim-host serve`."""

import http.client
import json
import shutil
import subprocess
import time
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent


def real_model():
    """The trained model (.ci/model), or None."""
    found = subprocess.run(["sh", TOP / ".ci/model", "--path"], capture_output=True, text=True, cwd=TOP, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


class Split:
    """`model` cut in `folder`, and the options that its workers and hosts have in common."""

    def __init__(self, programs, folder, model, middle, ctx=1024):
        self.programs = programs
        cut = [programs / "dim-split", model, "--middle", middle, "--out", folder]
        subprocess.run(cut, check=True, capture_output=True)
        key = folder / "key"
        key.write_text("5a" * 32 + "\n")
        (self.slice,) = folder.glob("*.middle-*.gguf")
        (self.manifest,) = folder.glob("*.split.json")
        self.common = ["--key-file", key, "--ctx", ctx, "--threads", 1]

    @classmethod
    def random(cls, programs, folder):
        """Of a tiny model with random weights."""
        model = folder / "tiny.gguf"
        subprocess.run([programs / "dim-synth", model, "--shape", "tiny", "-q"], check=True)
        return cls(programs, folder, model, "1..2")

    def worker(self, sessions, listen="127.0.0.1:0"):
        return [self.programs / "dim-worker", self.slice, *self.common, "--parallel", sessions, "--listen", listen]

    def host(self, command, worker, *more):
        return [self.programs / "dim-host", command, "--split", self.manifest, "--worker", worker, *self.common, *more]

    def serve(self, worker, slots, *more):
        return self.host("serve", worker, "--listen", "127.0.0.1:0", "--parallel", slots, *more)


class Processes:
    """Programs that listen; ended with the `with` block, the last one first."""

    def __init__(self):
        self.all = []

    def start(self, command):
        """Where it listens."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        process = subprocess.Popen([str(word) for word in command], **pipes)
        self.all.append(process)
        line = process.stdout.readline()
        assert line.startswith("listening on "), (command, line)
        return line.removeprefix("listening on ").strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in reversed(self.all):
            process.kill()
            process.wait()


def on(core, *command):
    """The command, on this core where there is `taskset`."""
    pin = ["taskset", "-c", str(core)] if shutil.which("taskset") else []
    return [*pin, *map(str, command)]


def asked(address, method, path, body=None):
    """The server's answer, to be read."""
    connection = http.client.HTTPConnection(address, timeout=600)
    connection.request(method, path, body and json.dumps(body), {"Host": "localhost", "Connection": "close"})
    return connection.getresponse()


def wait_until_ready(address):
    while asked(address, "GET", "/health").status != 200:
        time.sleep(0.1)
