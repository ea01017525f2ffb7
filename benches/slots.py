"""What slots give over a slow way: benches/slots.py target/release [ROUNDS]    (5 if not said)

Tokens a second of 1, 4 and 8 clients at once of `dim-host serve --parallel 8`, all their tokens over the time from the first request
to the last answer's end, and 4 and 8 clients' over one's in the same round; medians of the rounds, and the least and the largest.
The 0.5B shape of dim-synth (qwen2.5-0.5b, F16, random weights), cut so that host (with lm_head) and worker multiply with about as many
weights, over a relay that hands every byte on 5 ms later, each way; rows of F32. Host on core 0, worker on core 1, where there is
`taskset`. Before anything is timed, answers are looked at: of `serve --exact` every client's, eight at once, are those of `dim-host
generate`; of the batched server one client's are. How many of the timed answers are those, too, is printed: batches promise
`llama_decode`'s on the same rows, not each one's alone (docs/SERVER.md).
"""

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from served import Processes, Split, asked, on, wait_until_ready

SHAPE, MIDDLE, DELAY_S, N = "qwen2.5-0.5b", "4..19", 0.005, 48
PROMPTS = [f"Number {i} of a few short texts begins" for i in range(8)]


class Way:
    """A relay on loopback that hands bytes on `delay_s` later, in order, each way; however many are under way."""

    def __init__(self, delay_s):
        self.delay_s = delay_s
        self.target = None
        self.address = None
        ready = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self.serve(ready)), daemon=True).start()
        ready.wait()

    async def serve(self, ready):
        server = await asyncio.start_server(self.connected, "127.0.0.1", 0)
        self.address = "127.0.0.1:%d" % server.sockets[0].getsockname()[1]
        ready.set()
        await server.serve_forever()

    async def connected(self, reader, writer):
        host, port = self.target.rsplit(":", 1)
        there = await asyncio.open_connection(host, int(port))
        await asyncio.gather(self.one_way(reader, there[1]), self.one_way(there[0], writer), return_exceptions=True)

    async def one_way(self, reader, writer):
        under_way = asyncio.Queue()

        async def deliver():
            while (item := await under_way.get()) is not None:
                due, data = item
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                writer.write(data)
            writer.close()

        delivering = asyncio.create_task(deliver())
        while data := await reader.read(1 << 16):
            under_way.put_nowait((time.monotonic() + self.delay_s, data))
        under_way.put_nowait(None)
        await delivering


def answer(address, prompt):
    body = {"prompt": prompt, "max_tokens": N, "temperature": 0, "ignore_eos": True, "return_tokens": True, "cache_prompt": False}
    reply = json.load(asked(address, "POST", "/v1/completions", body))
    tokens = reply["choices"][0]["tokens"]
    assert len(tokens) == N, reply
    return tokens


def at_once(address, prompts):
    """Each one's tokens, and tokens a second of all."""
    start = time.monotonic()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: answer(address, prompt), prompts))
    return answers, len(prompts) * N / (time.monotonic() - start)


def serve(processes, split, way, *more):
    address = processes.start(on(0, *split.serve(way.address, len(PROMPTS), "--wire", "f32", *more))).removeprefix("http://")
    wait_until_ready(address)
    return address


def main():
    programs, n_rounds = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.gguf"
        subprocess.run([programs / "dim-synth", model, "--shape", SHAPE, "-q"], check=True)
        split = Split(programs, Path(folder), model, MIDDLE, ctx=512)
        model.unlink()
        way = Way(DELAY_S)
        with Processes() as processes:
            way.target = processes.start(on(1, *split.worker(len(PROMPTS) + 1)))
            alone = []
            for prompt in PROMPTS:
                generate = split.host("generate", way.address, "--wire", "f32", "--temp", "0", "--json", "--ignore-eos", "-n", N, "-p", prompt)
                alone.append(json.loads(subprocess.run(on(0, *generate), capture_output=True, check=True).stdout)["tokens"])
            with Processes() as exact:
                assert at_once(serve(exact, split, way, "--exact"), PROMPTS)[0] == alone, "not the same tokens"
            address = serve(processes, split, way)
            assert at_once(address, PROMPTS[:1])[0] == alone[:1], "not the same tokens"
            ratios = {4: [], 8: []}
            for _ in range(n_rounds):
                one = at_once(address, PROMPTS[:1])[1]
                line = f"1 client {one:.2f} tok/s"
                for n, all_of in ratios.items():
                    answers, speed = at_once(address, PROMPTS[:n])
                    same = sum(a == b for a, b in zip(answers, alone))
                    all_of.append(speed / one)
                    line += f"; {n} clients {speed:.2f} tok/s, {all_of[-1]:.2f} x, {same} of {n} as alone"
                print(line, flush=True)
            for n, all_of in ratios.items():
                print(f"{n} clients: median {statistics.median(all_of):.2f} x, {min(all_of):.2f} to {max(all_of):.2f}")


if __name__ == "__main__":
    main()
