"""The official JSON Schema Test Suite (draft 2020-12) against `dim-host serve`: json_schema.py target/release [--all]

Each schema of the suite is sent as a `response_format` to a server over two processes, with trained weights (SmolLM2, .ci/model)
and with random ones: it is a 400 whose sentence says what is not supported and which field it was, or every answer that came to
its end is valid by the `jsonschema` package. An answer that max_tokens cut is counted by itself. Then schemas that were made to
kill, after each of which the server has to answer. Without --all a share of it, for a minute at most; with it,
what a constraint costs as well.

The suite is in the source package of `jsonschema`, which pip fetches once into .venv; where it cannot, this says so.
"""

import concurrent.futures
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import jsonschema

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from served import TOP, Processes, Split, real_model

PACKAGE = "jsonschema==4.26.0"
SHA256 = "0c26707e2efad8aa1bfc5b7ce170f3fccc2e4918ff85989ba9ffa9facb2be326"
ALL = "--all" in sys.argv[2:]
# how a choice is sampled, and its most tokens: trained weights take their time
TRAINED = [{"temperature": 1, "seed": 1, "max_tokens": 48}]
RANDOM = [{"temperature": 0, "max_tokens": 64}, {"temperature": 1.5, "seed": 2, "top_p": 1, "max_tokens": 64}] if ALL else TRAINED
SECONDS = 24 * 3600 if ALL else 25


def suite():
    """Every schema with where it stands, or None where the package cannot be had."""
    store = TOP / ".venv" / "json-schema-test-suite"
    archive = store / "jsonschema-4.26.0.tar.gz"
    if not archive.is_file():
        store.mkdir(exist_ok=True)
        (store / "requirements.txt").write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--no-binary", ":all:"]
        pip += ["--require-hashes", "-r", store / "requirements.txt", "-d", store]
        if subprocess.run(pip, capture_output=True, check=False).returncode or not archive.is_file():
            return None
    schemas = []
    with tarfile.open(archive) as packed:
        folder = f"{archive.name.removesuffix('.tar.gz')}/json/tests/draft2020-12/"
        names = [n for n in packed.getnames() if n.startswith(folder) and n.endswith(".json") and "/" not in n[len(folder) :]]
        for name in sorted(names):
            for case in json.load(packed.extractfile(name)):
                schemas.append((f"{Path(name).stem}: {case['description']}", case["schema"]))
    return schemas


def hostile():
    """Schemas that are small and mean a lot."""
    word = {"type": "string"}
    nested, doubled = word, word
    for _ in range(60):
        nested = {"properties": {"a": nested}}
    for _ in range(11):
        doubled = {"anyOf": [{"type": "array", "items": doubled}, {"type": "object", "properties": {"a": doubled}}]}
    names = {f"p{i}": word for i in range(900)}
    patterns = {f"^(a|b)*a(a|b){{{i}}}$": {} for i in range(12, 22)}
    keyed = {f"^k{i}_[a-z]+$": {"type": "integer"} for i in range(16)}
    yield "levels", "[" * 500_000
    yield "nested", nested
    yield "doubled", doubled
    yield "properties", {"properties": names}
    yield "more properties", {"properties": names, "required": list(names)}
    yield "enum", {"enum": [f"v{i}" for i in range(4900)]}
    yield "patterns that overlap", {"patternProperties": patterns}
    yield "patterns compared often", {"$defs": {"a": {"patternProperties": keyed}}, "anyOf": [{"allOf": [{"$ref": "#/$defs/a"}, {"properties": {f"k{i}": {}}}]} for i in range(900)]}
    yield "pattern in pattern", {"pattern": "(((((a{1,100}){1,100}){1,100}){1,100}){1,100})"}
    yield "pattern of brackets", {"pattern": "(" * 16_000 + ")" * 300}
    yield "pattern with memory", {"pattern": "^(.*a.{200}.*b.{200}|(a|b)*a(a|b){20})$"}
    yield "lengths", {"type": "string", "minLength": 10**9, "maxLength": 4 * 10**9}
    yield "items", {"type": "array", "minItems": 10**9}
    yield "range", {"type": "number", "minimum": -1.7e308, "maximum": 1.7e308, "multipleOf": 1e-300}
    yield "refers to itself", {"$ref": "#"}
    yield "refers in a circle", {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    yield "all of itself", {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}
    yield "choices of choices", {"allOf": [{"anyOf": [{"properties": {f"a{i}": {"type": "integer"}}, "required": [f"a{i}"]} for i in range(8)]}] * 5}
    yield "options of the library", {"x-guidance": {"coerce_one_of": True, "lenient": True}, "oneOf": [{"minimum": 1}, {"maximum": 5}], "not": {}}
    yield "letters", {"type": "a" + "é" * 80}
    yield "numbers", {"multipleOf": 999_999_937, "type": "integer"}


class Server:
    """A server of `split`, and the same by `dim-host generate`."""

    def __init__(self, split, processes):
        worker = processes.start(split.worker(3))
        self.generate = split.host("generate", worker, "--json")
        self.address = processes.start(split.serve(worker, 2))

    def ask(self, schema, **more):
        """(status, choices or error)"""
        named = {"type": "json_schema", "json_schema": {"name": "of_the_suite", "strict": True, "schema": schema}}
        return self.post({"prompt": "As JSON: ", "response_format": named, **more})

    def post(self, body):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}/v1/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)["choices"]
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]


def check(server, where, schema, ways, counts):
    """One schema, every way."""
    for way in ways:
        status, answer = server.ask(schema, **way)
        if status == 400 and answer["code"] == "schema_not_followed":
            counts["given up"] += 1
            continue
        if status == 400:
            assert answer["param"] == "response_format.json_schema.schema" and len(answer["message"]) > 50, (where, answer)
            counts["refused"] += 1
            return
        assert status == 200, (where, status, answer)
        counts["taken"] += way is ways[0]
        for choice in answer:
            if choice["finish_reason"] == "length":
                counts["cut"] += 1
                continue
            try:
                jsonschema.Draft202012Validator(schema).validate(json.loads(choice["text"]))
                counts["valid"] += 1
            except (ValueError, jsonschema.ValidationError) as error:
                counts["invalid"] += 1
                print(f"INVALID {where}\n  {json.dumps(schema)}\n  {choice['text']!r}\n  {str(error).splitlines()[0]}", flush=True)


def run(name, server, schemas, ways):
    start = time.monotonic()
    counts = dict.fromkeys(["refused", "taken", "valid", "cut", "given up", "invalid"], 0)
    asked = 0
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for i in range(0, len(schemas), 8):
            some = schemas[i : i + 8]
            list(pool.map(lambda case: check(server, *case, ways, counts), some))
            asked += len(some)
            if time.monotonic() - start > SECONDS:
                break
    row = " | ".join(str(n) for n in counts.values())
    print(f"| {name} | {asked} | {row} |", flush=True)
    return counts["invalid"] == 0


def kill(server):
    slowest = ("", 0.0)
    for name, schema in hostile():
        start = time.monotonic()
        if isinstance(schema, str):
            status, answer = server.post(b'{"prompt": "x", "max_tokens": 4, "json_schema": ' + schema.encode() + b"}")
        else:
            status, answer = server.ask(schema, max_tokens=12)
        took = time.monotonic() - start
        slowest = max(slowest, (name, took), key=lambda pair: pair[1])
        assert status in (200, 400), (name, status, answer)
        assert took < 10, (name, took)
        status, answer = server.ask({"const": "alive"}, temperature=0, max_tokens=20)
        assert status == 200 and answer[0]["text"] == '"alive"', (name, answer)
    print(f"schemas made to kill: the server lives, the slowest ({slowest[0]}) took {slowest[1]:.2f} s")


def cost(server):
    """Generation with and without a constraint, in turns; choosing a token alone, in ms."""
    long = {"type": "array", "minItems": 1000, "items": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}}
    told = {"without": [], "constrained": []}
    for _ in range(5):
        for name, more in {"without": ["--ignore-eos"], "constrained": ["-j", json.dumps(long)]}.items():
            options = ["--temp", "0", "-n", "192", "-p", "The names of all rivers of Europe as JSON: ", *more]
            command = [str(word) for word in [*server.generate, *options]]
            report = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
            assert len(report["tokens"]) == 192, report
            told[name].append((report["gen_tok_s"], report["sample_ms"] / 192))
    ratios = [c[0] / w[0] for w, c in zip(told["without"], told["constrained"])]
    speed, choice = ({name: statistics.median(run[i] for run in runs) for name, runs in told.items()} for i in (0, 1))
    print(
        f"cost: {speed['without']:.1f} tok/s without, {speed['constrained']:.1f} constrained, ratios {[round(r, 3) for r in sorted(ratios)]}; "
        f"choosing a token {choice['without']:.3f} ms without, {choice['constrained']:.3f} ms constrained"
    )


def main():
    programs = Path(sys.argv[1]).resolve()
    schemas = suite()
    if schemas is None:
        print("not run: the JSON Schema Test Suite, which is in PyPI's source package of jsonschema")
        schemas = []
    print("| weights | schemas | refused | taken | valid answers | cut | given up | invalid |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    fine = True
    with tempfile.TemporaryDirectory() as folder, Processes() as processes:
        server = Server(Split.random(programs, Path(folder)), processes)
        fine &= run("random", server, schemas if ALL else schemas[::4], RANDOM)
        kill(server)
    model = real_model()
    if model is None:
        print("not run: no real weights (sh .ci/model fetches them)")
        sys.exit(not fine)
    with tempfile.TemporaryDirectory() as folder, Processes() as processes:
        server = Server(Split(programs, Path(folder), model, "10..19"), processes)
        fine &= run("trained", server, schemas if ALL else schemas[1::8], TRAINED)
        if ALL:
            # the server, which is the last one: it is not to compute beside what is measured
            processes.all[-1].kill()
            cost(server)
    sys.exit(not fine)


main()
