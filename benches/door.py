"""What the door costs: benches/door.py target/release [PAIRS]    (10 if not said)

Tokens a second of one client that streams from `dim-host serve`, seen from the client, over those that `dim-host generate --json`
says of itself, of the same model cut in the same way over a worker of its own, in turns; greedy, and the same tokens. The median
of the pairs, and the least and the largest. Hosts on core 0, workers on core 1, where there is `taskset`.
"""

import http.client
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
PROMPT, N = "The history of the sea begins", 64


def on(core, *command):
    pin = ["taskset", "-c", str(core)] if shutil.which("taskset") else []
    return [*pin, *map(str, command)]


def start(processes, command):
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    processes.append(process)
    return process.stdout.readline().removeprefix("listening on ").strip()


def asked(address, method, path, body=None):
    connection = http.client.HTTPConnection(address, timeout=600)
    connection.request(method, path, body and json.dumps(body), {"Host": "localhost", "Connection": "close"})
    return connection.getresponse()


def streamed(address):
    """Tokens, and how many a second from the first to the last."""
    body = {"prompt": PROMPT, "max_tokens": N, "temperature": 0, "ignore_eos": True, "stream": True, "return_tokens": True}
    body["cache_prompt"] = False
    tokens, times = [], []
    for line in asked(address, "POST", "/v1/completions", body):
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:])["choices"]:
                tokens += choice.get("tokens", [])
                times += [time.monotonic()] * len(choice.get("tokens", []))
    return tokens, (len(times) - 1) / (times[-1] - times[0])


def main():
    programs, n_pairs = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 10
    model = subprocess.run(["sh", TOP / ".ci/model", "--path"], capture_output=True, text=True, cwd=TOP, check=True).stdout.strip()
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cut = [programs / "dim-split", model, "--middle", "10..19", "--out", folder]
        subprocess.run(cut, check=True, capture_output=True)
        (folder / "key").write_text("5a" * 32 + "\n")
        (middle,), (split,) = folder.glob("*.middle-*.gguf"), folder.glob("*.split.json")
        common = ["--key-file", folder / "key", "--ctx", "512", "--threads", "1"]
        try:
            worker = [programs / "dim-worker", middle, *common, "--parallel", "2", "--listen", "127.0.0.1:0"]
            one, other = (start(processes, on(1, *worker)) for _ in range(2))
            host = [programs / "dim-host", "serve", "--split", split, "--worker", one, *common, "--listen", "127.0.0.1:0"]
            address = start(processes, on(0, *host)).removeprefix("http://")
            generate = [programs / "dim-host", "generate", "--split", split, "--worker", other, *common, "--temp", "0", "--json"]
            generate += ["--ignore-eos", "-n", N, "-p", PROMPT]
            while asked(address, "GET", "/health").status != 200:
                time.sleep(0.1)
            ratios = []
            for i in range(n_pairs + 1):
                tokens, door = streamed(address)
                report = json.loads(subprocess.run(on(0, *generate), capture_output=True, check=True).stdout)
                assert tokens == report["tokens"], "not the same tokens"
                # the first pair warms what is read from files
                if i > 0:
                    ratios.append(door / report["gen_tok_s"])
                    print(f"door {door:.2f} tok/s, generate {report['gen_tok_s']:.2f} tok/s, ratio {ratios[-1]:.3f}", flush=True)
            print(f"median {statistics.median(ratios):.3f} of {n_pairs} pairs, {min(ratios):.3f} to {max(ratios):.3f}")
        finally:
            for process in processes:
                process.kill()
                process.wait()


main()
