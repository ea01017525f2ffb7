"""Other people's clients against `dim-host serve`: run.py target/release [NAME ...]

Cuts SmolLM2 (.ci/model) in three, starts a worker and a server as processes, and runs every client of the table below against
them, each as a program of its own: it finds the server in DIM_URL and its key in DIM_KEY. A client that is not installed here
(.ci/setup clients says why) is not run; it is named, and target/not-run/clients keeps the names for .ci/summary.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from served import TOP, Processes, Split, real_model

KEY = "the-key-of-the-test"


def has_python(*names):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"Python's {missing[0]} is not installed" if missing else None


def has_node(*names):
    if shutil.which("node") is None:
        return "node is not installed"
    missing = [name for name in names if not (TOP / "tests/node_modules" / name).is_dir()]
    return f"Node's {missing[0]} is not installed" if missing else None


def has_browser():
    if not any(map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])):
        return "there is no Chromium"
    return has_node("playwright-core", "axe-core")


# a template that has a place for tools
TOOLS = ["--chat-template", TOP / "llama-sys-patch/tests/templates/hermes.jinja"]

# name, what is to be run, what it lacks here, what else the server is started with
CLIENTS = [
    ("openai-python", [sys.executable, HERE / "openai_python.py"], lambda: has_python("openai"), []),
    ("openai-tools", [sys.executable, HERE / "openai_tools.py"], lambda: has_python("openai"), TOOLS),
    ("responses-tools", [sys.executable, HERE / "responses_tools.py"], lambda: has_python("openai"), TOOLS),
    ("anthropic", [sys.executable, HERE / "anthropic_python.py"], lambda: has_python("anthropic"), []),
    ("anthropic-tools", [sys.executable, HERE / "anthropic_tools.py"], lambda: has_python("anthropic"), TOOLS),
    ("langchain", [sys.executable, HERE / "langchain_python.py"], lambda: has_python("langchain_openai"), []),
    ("llm", [sys.executable, HERE / "llm_command.py"], lambda: has_python("llm"), []),
    ("openai-node", ["node", HERE / "openai_node.mjs"], lambda: has_node("openai"), []),
    ("responses-node", ["node", HERE / "responses_node.mjs"], lambda: has_node("openai"), TOOLS),
    ("browser", ["node", TOP / "tests/browser/page.mjs"], has_browser, []),
    ("browser-alone", ["node", TOP / "tests/browser/alone.mjs"], has_browser, ["--fallback", "local", "--give-up-after", "1"]),
]


def environment(split, processes, *more):
    """Starts a worker and a server, and tells a client where they are."""
    worker = processes.start(split.worker(3))
    url = processes.start(split.serve(worker, 2, "--model-alias", "smol", *more))
    return {
        "DIM_URL": url,
        "DIM_KEY": KEY,
        # for whoever kills the worker, and starts it again where it was
        "DIM_WORKER_PID": str(processes.all[0].pid),
        "DIM_WORKER": json.dumps([str(word) for word in split.worker(3, worker)]),
    }


def main():
    programs = Path(sys.argv[1]).resolve()
    wanted = sys.argv[2:]
    unknown = set(wanted) - {name for name, *_ in CLIENTS}
    if unknown:
        sys.exit(f"error: there is no client {', '.join(sorted(unknown))}")
    clients = [client for client in CLIENTS if not wanted or client[0] in wanted]
    model = real_model()
    lacks = {name: lack() if model else "no real weights" for name, _, lack, _ in clients}
    not_run = [f"client {name}: {why}" for name, why in lacks.items() if why]
    if not wanted:
        kept = TOP / "target/not-run/clients"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text("".join(line + "\n" for line in not_run))
    print("".join(f"not run: {line}\n" for line in not_run), end="", flush=True)
    clients = [client for client in clients if not lacks[client[0]]]
    if not clients:
        return
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        split = Split(programs, folder, model, "10..19")
        api_keys = folder / "api-keys"
        api_keys.write_text(KEY + "\n")
        for name, command, _, more in clients:
            with Processes() as processes:
                told = os.environ | environment(split, processes, "--api-key-file", api_keys, *more)
                done = subprocess.run(command, env=told, check=False, cwd=folder)
            if done.returncode:
                failed.append(name)
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
