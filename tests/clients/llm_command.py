"""The program `llm` against `dim-host serve`, which it knows as an OpenAI-compatible server: an answer, streamed and whole, and a
conversation that goes on. run.py starts the server.
"""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

home = Path("llm-home").resolve()
home.mkdir()
(home / "extra-openai-models.yaml").write_text(
    f"- model_id: dim\n  model_name: smol\n  api_base: {os.environ['DIM_URL']}/v1\n  api_key_name: dim\n"
)


def llm(*words):
    environment = os.environ | {"LLM_USER_PATH": str(home)}
    done = subprocess.run([sys.executable, "-m", "llm", *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    return done.stdout.strip()


llm("keys", "set", "dim", "--value", os.environ["DIM_KEY"])
ask = ["-m", "dim", "-o", "temperature", "0", "-o", "max_tokens", "24", "What is the capital of France?"]
streamed = llm(*ask)
assert len(streamed) > 10, streamed
assert llm("--no-stream", *ask) == streamed
assert llm("-c", "-o", "temperature", "0", "-o", "max_tokens", "24", "And what is its river?")
print(f"llm {version('llm')}: streamed, whole, a conversation")
