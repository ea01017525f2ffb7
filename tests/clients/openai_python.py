"""OpenAI's own client against `dim-host serve`, by the `openai` package: chat, streaming, stop, logprobs, logit_bias, several
choices, answers of a form, what is wrong. run.py starts the server.
"""

import os
from typing import Literal

import openai
from pydantic import BaseModel

ASK = [{"role": "user", "content": "What is the capital of France?"}]


class City(BaseModel):
    name: Literal["Paris", "London", "Rome"]
    is_capital: bool


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
    for wrong, field in [({"temperature": -1}, "temperature"), ({"tools": [{"type": "function"}]}, "tools[0].function"), ({"n": 0}, "n")]:
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


check(openai.OpenAI(base_url=os.environ["DIM_URL"] + "/v1", api_key=os.environ["DIM_KEY"], max_retries=0))
print(f"openai {openai.__version__}: chat, streaming, stop, logprobs, choices, classes, errors")
