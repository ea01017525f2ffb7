"""What the door costs: benches/door.py target/release [PAIRS]    (10 if not said)

Tokens a second of one client that streams from `dim-host serve`, seen from the client, over those that `dim-host generate --json`
says of itself, of the same model cut in the same way over a worker of its own, in turns; greedy, and the same tokens. The median
of the pairs, and the least and the largest. Hosts on core 0, workers on core 1, where there is `taskset`.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from served import Processes, Split, asked, on, real_model, wait_until_ready

PROMPT, N = "The history of the sea begins", 64


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
    model = real_model() or sys.exit("error: no real weights (sh .ci/model fetches them)")
    with tempfile.TemporaryDirectory() as folder, Processes() as processes:
        split = Split(programs, Path(folder), model, "10..19", ctx=512)
        one, other = (processes.start(on(1, *split.worker(2))) for _ in range(2))
        address = processes.start(on(0, *split.serve(one, 1))).removeprefix("http://")
        generate = split.host("generate", other, "--temp", "0", "--json", "--ignore-eos", "-n", N, "-p", PROMPT)
        wait_until_ready(address)
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


if __name__ == "__main__":
    main()
