"""OpenAI's own client against `dim-host serve`: openai_python.py target/release

Cuts SmolLM2 (.ci/model) in three, starts a worker and a server as processes, and asks by the `openai` package: chat, streaming,
stop, logprobs, logit_bias, several choices, answers of a form, what is wrong. Without the model it says so.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import openai
from pydantic import BaseModel

TOP = Path(__file__).parent.parent.parent
ASK = [{"role": "user", "content": "What is the capital of France?"}]


class City(BaseModel):
    name: Literal["Paris", "London", "Rome"]
    is_capital: bool


def listening(process):
    line = process.stdout.readline()
    assert line.startswith("listening on "), line
    return line.removeprefix("listening on ").strip()


def check(client):
    create = lambda **more: client.chat.completions.create(model="any", messages=ASK, temperature=0, max_tokens=24, **more)
    whole = create()
    text = whole.choices[0].message.content
    assert text and whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens, whole
    print("chat:", text)

    parts = list(create(stream=True, stream_options={"include_usage": True}))
    streamed = "".join(c.delta.content or "" for part in parts for c in part.choices)
    assert streamed == text, (streamed, text)
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens and parts[-1].choices == []
    assert [c.finish_reason for p in parts for c in p.choices if c.finish_reason] == [whole.choices[0].finish_reason]

    stop = text[len(text) // 2 :][:4]
    stopped = create(stop=["never said at all", stop]).choices[0]
    assert stopped.message.content == text[: text.find(stop)] and stopped.finish_reason == "stop", stopped

    told = create(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert all(len(t.top_logprobs) == 3 and t.logprob <= 0 and t.top_logprobs[0].token == t.token for t in told)
    # the end of the reply is a token that is not told
    assert b"".join(bytes(t.bytes) for t in told).decode() == text

    first = client.completions.create(model="any", prompt="The capital of France is", temperature=0, max_tokens=1, logprobs=2)
    assert first.choices[0].text == first.choices[0].logprobs.tokens[0] and len(first.choices[0].logprobs.top_logprobs[0]) == 2
    two = client.chat.completions.create(model="any", messages=ASK, n=2, seed=5, max_tokens=16, temperature=1.5)
    assert two.choices[0].message.content != two.choices[1].message.content
    assert client.models.list().data[0].id == "smol"

    held = {"model": "any", "messages": ASK, "response_format": City, "max_tokens": 200}
    for more in ({"temperature": 0}, {"temperature": 1.5, "seed": 3, "n": 3, "logprobs": True}):
        choices = client.chat.completions.parse(**held, **more).choices
        assert all(isinstance(choice.message.parsed, City) and choice.finish_reason == "stop" for choice in choices), choices
    with client.chat.completions.stream(**held, temperature=0) as stream:
        city = stream.get_final_completion().choices[0].message.parsed
    assert city == client.chat.completions.parse(**held, temperature=0).choices[0].message.parsed
    print("as a class:", city)
    for wrong, field in [({"temperature": -1}, "temperature"), ({"tools": [{"type": "function"}]}, "tools"), ({"n": 0}, "n")]:
        try:
            client.chat.completions.create(**{"model": "any", "messages": ASK, **wrong})
            raise SystemExit(f"{wrong} was taken")
        except openai.BadRequestError as error:
            assert error.param == field, error
    try:
        client.with_options(api_key="not-the-key").models.list()
        raise SystemExit("a wrong key was taken")
    except openai.AuthenticationError as error:
        assert error.code == "invalid_api_key"


def main():
    programs = Path(sys.argv[1]).resolve()
    model = subprocess.run(["sh", TOP / ".ci/model", "--path"], capture_output=True, text=True, cwd=TOP, check=False)
    if model.returncode:
        print("not run: no real weights (sh .ci/model fetches them)")
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cut = [programs / "dim-split", model.stdout.strip(), "--middle", "10..19", "--out", folder]
        subprocess.run(cut, check=True, capture_output=True)
        (folder / "key").write_text("5a" * 32 + "\n")
        (folder / "api-keys").write_text("the-key-of-the-test\n")
        common = ["--key-file", folder / "key", "--ctx", "1024", "--threads", "1", "--listen", "127.0.0.1:0"]
        (middle,) = folder.glob("*.middle-*.gguf")
        (split,) = folder.glob("*.split.json")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        worker = subprocess.Popen([programs / "dim-worker", middle, *common], **pipes)
        server = None
        try:
            serve = [programs / "dim-host", "serve", "--split", split, "--worker", listening(worker), *common]
            serve += ["--model-alias", "smol", "--api-key-file", folder / "api-keys"]
            server = subprocess.Popen(serve, **pipes)
            address = listening(server)
            check(openai.OpenAI(base_url=f"{address}/v1", api_key="the-key-of-the-test", max_retries=0))
        finally:
            for process in filter(None, [server, worker]):
                process.kill()
                process.wait()
    print(f"openai {openai.__version__}: chat, streaming, stop, logprobs, choices, classes, errors")


main()
