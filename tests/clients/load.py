"""A crowd at `dim-host serve`: load.py target/release [SECONDS]    (60 if not said; ten minutes: 600)

Sixteen clients on four slots of a small model with random weights, split over two processes. Every second request leaves early:
in the queue, during its prompt or in the middle of its reply; the others are read to their end and have to be whole. Beside them
a thousand connections that never say a whole request, some of them a byte a second, and one client whose requests are drawn from
what requests are made of and then broken: each of them is answered, never with a fault of the server. At the end every slot is free, nobody waits,
a good client is served, and the memory of host and worker is what it was after the first quarter. Prints what the server counted.
"""

import http.client
import json
import os
import random
import resource
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from served import Processes, Split

N_CLIENTS, N_SLOTS, N_SILENT = 16, 4, 1000
# pages that an allocator keeps, not what a request leaves behind: at 5 a second a kilobyte each would show in ten minutes
GROWTH_MIB = 16
WORDS = "the quick brown fox jumps over the lazy dog and lies down in the shade of an old pear tree".split()


def memory_mib(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


# what requests are made of, right and wrong
FIELDS = """messages prompt input system instructions role content type text temperature top_p top_k min_p seed stop stop_sequences
logprobs top_logprobs logit_bias tools tool_choice response_format stream stream_options echo n max_tokens return_tokens cache_prompt
presence_penalty grammar json_schema format previous_response_id ignore_eos id name input_schema parameters tool_use_id is_error thinking
call_id arguments output output_config schema reasoning effort parallel_tool_calls""".split()
VALUES = [None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, 2**31, 2**63, -(2**63), 2**64, "", "a", "user", "assistant", "system", "text",
          "tool", "tool_use", "tool_result", "function", "function_call", "function_call_output", "any", "required", "json_schema", "json_object", "\x00", "\ud800", "\U0001f600", "x" * 3000, [], {}, [1, 2], ["a"], [[1], [2]], {"7": -100}, {"type": "text", "text": "b"},
          {"role": "user", "content": "Hi"}, {"type": "tool_use", "id": "1", "name": "f", "input": {}},
          [{"type": "tool_result", "tool_use_id": "1", "content": "b"}], [{"name": "f", "input_schema": {"type": "object"}}],
          {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}, [{"type": "function", "name": "f"}], [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]]


def near(chance, depth):
    """A value that is nearly a request."""
    kind = chance.random()
    if depth > 3 or (depth > 0 and kind < 0.6):
        return chance.choice(VALUES)
    if depth > 0 and kind < 0.7:
        return [near(chance, depth + 1) for _ in range(chance.randrange(4))]
    made = {chance.choice(FIELDS): near(chance, depth + 1) for _ in range(chance.randrange(6))}
    if depth == 0 and chance.random() < 0.7:
        made |= {"prompt": "a", "messages": [{"role": "user", "content": "Hi"}], "input": "Hi"}
    return made


class Crowd:
    def __init__(self, address):
        self.address = address
        self.lock = threading.Lock()
        self.counts = dict.fromkeys(["whole", "left", "refused", "wild"], 0)
        self.errors = []
        self.end = threading.Event()

    def ask(self, path, body=None):
        connection = http.client.HTTPConnection(self.address, timeout=60)
        connection.request("POST" if body else "GET", path, body and json.dumps(body), {"Host": "localhost"})
        return connection, connection.getresponse()

    def get(self, path):
        connection, response = self.ask(path)
        text = response.read().decode()
        connection.close()
        assert response.status == 200, text
        return text

    def count(self, what):
        with self.lock:
            self.counts[what] += 1

    def client(self, seed):
        chance = random.Random(seed)
        while not self.end.is_set():
            try:
                self.count(self.request(chance))
            except Exception as error:  # noqa: BLE001: whatever it is, it is told at the end
                self.errors.append(repr(error))

    def request(self, chance):
        prompt = " ".join(chance.choice(WORDS) for _ in range(chance.randrange(4, 90)))
        n = chance.randrange(4, 48)
        leaves = chance.random() < 0.5
        body = {"prompt": prompt, "max_tokens": 400 if leaves else n, "ignore_eos": True, "stream": True, "return_tokens": True}
        if leaves and chance.random() < 0.4:
            # before a word was said: in the queue or during its prompt
            connection = http.client.HTTPConnection(self.address, timeout=60)
            connection.request("POST", "/v1/completions", json.dumps(body), {"Host": "localhost"})
            time.sleep(chance.random() * 0.05)
            connection.sock.close()
            return "left"
        connection, response = self.ask("/v1/completions", body)
        if response.status == 503:
            response.read()
            connection.close()
            time.sleep(0.2)
            return "refused"
        assert response.status == 200, response.read()
        tokens, is_done = 0, False
        for line in response:
            if line.startswith(b"data: [DONE]"):
                is_done = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                assert "error" not in event, event
                tokens += sum(len(choice.get("tokens", [])) for choice in event["choices"])
            if leaves and tokens >= n // 2:
                break
        connection.close()
        if leaves:
            return "left"
        assert is_done and tokens == n, (is_done, tokens, n)
        return "whole"

    def wild(self):
        """Requests that are nearly right, and heads that are not: every one is answered, and none with a fault of the server."""
        chance = random.Random(99)
        while not self.end.is_set():
            try:
                path, body = chance.choice(["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"]), near(chance, 0)
                if isinstance(body, dict):
                    # what is right about it is short
                    body.update({"max_tokens": chance.choice([1, 2, 3, -7, "x"]), "n": chance.choice([1, 1, 2, 129]), "max_output_tokens": 2})
                text = json.dumps(body).encode()
                if chance.random() < 0.2:
                    at = chance.randrange(len(text))
                    text = text[:at] + bytes([chance.randrange(256)]) + text[at + chance.randrange(3) :]
                connection = http.client.HTTPConnection(self.address, timeout=60)
                connection.request("POST", path, text, {"Host": "localhost"})
                response = connection.getresponse()
                answer = response.read()
                connection.close()
                assert response.status in (200, 400, 413, 422, 503), (response.status, text, answer)
                assert response.status == 200 or json.loads(answer)["error"]["message"], (text, answer)
                self.count("wild")
                self.raw(chance)
            except Exception as error:  # noqa: BLE001
                self.errors.append(repr(error))

    def raw(self, chance):
        head = bytearray(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 14\r\n\r\n{\"prompt\":\"a\"}")
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(head))
            head[at : at + chance.randrange(3)] = bytes(chance.randrange(256) for _ in range(chance.randrange(3)))
        connection = socket.create_connection(self.address.split(":"), timeout=5)
        try:
            connection.sendall(head)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        except OSError:
            pass
        connection.close()

    def silent(self):
        """Connections that say half a request, and go on a byte a second; where one is shown out another one comes."""
        half = b"POST /v1/completions HTTP/1.1\r\nHost: local"
        open_ones = []
        while not self.end.wait(1.0):
            for i, connection in enumerate(open_ones):
                try:
                    if i % 3 == 0:
                        connection.send(b"x")
                    if connection.recv(1, socket.MSG_DONTWAIT) == b"":
                        raise ConnectionResetError
                except BlockingIOError:
                    pass
                except OSError:
                    connection.close()
                    open_ones[i] = None
            open_ones = [connection for connection in open_ones if connection]
            while len(open_ones) < N_SILENT and not self.end.is_set():
                try:
                    connection = socket.create_connection(self.address.split(":"), timeout=5)
                    connection.send(half)
                    open_ones.append(connection)
                except OSError:
                    break
        for connection in open_ones:
            connection.close()


def p99(metrics, name):
    """The upper end of the bucket in which the 99th of a hundred lies."""
    buckets = [line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith(f"dim_{name}_bucket")]
    buckets = [(label.split('le="')[1].split('"')[0], int(count)) for label, count in buckets]
    return next((label for label, count in buckets if count >= 0.99 * buckets[-1][1]), "+Inf")


def run(programs, folder, seconds):
    split = Split.random(programs, folder)
    with Processes() as processes:
        url = processes.start(split.serve(processes.start(split.worker(N_SLOTS + 1)), N_SLOTS))
        crowd = Crowd(url.removeprefix("http://"))
        while json.loads(crowd.get("/split"))["health"]["status"] != "ok":
            time.sleep(0.05)
        threads = [threading.Thread(target=crowd.client, args=(seed,)) for seed in range(N_CLIENTS)]
        threads += [threading.Thread(target=crowd.silent), threading.Thread(target=crowd.wild)]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 4)
        warm = [memory_mib(process) for process in processes.all]
        time.sleep(seconds * 3 / 4)
        crowd.end.set()
        for thread in threads:
            thread.join()
        deadline = time.monotonic() + 10
        while (props := json.loads(crowd.get("/props")))["slots_busy"] or props["requests_waiting"]:
            assert time.monotonic() < deadline, f"a slot is stuck: {props}"
            time.sleep(0.05)
        last = [memory_mib(process) for process in processes.all]
        connection, response = crowd.ask("/v1/completions", {"prompt": "the", "max_tokens": 3, "ignore_eos": True})
        assert json.loads(response.read())["usage"]["completion_tokens"] == 3
        connection.close()
        assert not crowd.errors, crowd.errors[:3]
        assert min(crowd.counts[what] for what in ("whole", "left", "wild")) > 0, crowd.counts
        for name, before, after in zip(["worker", "host"], warm, last):
            print(f"{name}: {before:.1f} MiB after a quarter, {after:.1f} MiB at the end")
            assert after - before < GROWTH_MIB, f"the {name} grows"
        metrics = crowd.get("/metrics")
        print(f"{seconds} s, {N_CLIENTS} clients on {N_SLOTS} slots, {N_SILENT} silent connections: {crowd.counts}")
        print(f"99 of 100 waited at most {p99(metrics, 'slot_wait_seconds')} s for a slot, {p99(metrics, 'first_token_seconds')} s for a token")


def main():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * N_SILENT:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    programs = Path(sys.argv[1]).resolve()
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 60.0
    with tempfile.TemporaryDirectory() as folder:
        run(programs, Path(folder), seconds)


if sys.platform != "linux":
    print(f"not run: memory is read from /proc ({os.path.basename(__file__)})")
else:
    main()
