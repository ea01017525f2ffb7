"""Anthropic's own client against `dim-host serve`, by the `anthropic` package: a message, streaming, stop sequences, what is wrong;
and OpenAI's for `/v1/responses`, the other form of one text. run.py starts the server.
"""

import os

import anthropic
import openai

ASK = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]


def messages(client):
    asked = {"model": "smol", "messages": ASK, "system": "You are brief.", "max_tokens": 24}
    # no argument of its newest client any more, but still a field
    asked["extra_body"] = {"temperature": 0}
    whole = client.messages.create(**asked)
    text = whole.content[0].text
    assert text and whole.role == "assistant" and whole.stop_reason in ("end_turn", "max_tokens"), whole
    assert 0 < whole.usage.output_tokens <= 24 and whole.usage.input_tokens > 10, whole
    print("message:", text)

    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == text
        final = stream.get_final_message()
    assert final.content[0].text == text and final.stop_reason == whole.stop_reason, final
    # a cache holds the prompt now, and it is counted all the same
    counted = [m.usage.input_tokens + (m.usage.cache_read_input_tokens or 0) for m in (whole, final)]
    assert counted[0] == counted[1] and final.usage.output_tokens == whole.usage.output_tokens, (whole, final)

    stop = text[len(text) // 2 :][:4]
    stopped = client.messages.create(**asked, stop_sequences=["never said at all", stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop), stopped
    assert stopped.content[0].text == text[: text.find(stop)], stopped

    for wrong, field in [({"max_tokens": 0}, "max_tokens"), ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
                         # SmolLM2's own template has no place for them
                         ({"tools": [{"name": "f", "input_schema": {}}]}, "tools"), ({"messages": []}, "messages")]:
        try:
            client.messages.create(**{**asked, **wrong})
            raise SystemExit(f"{wrong} was taken")
        except anthropic.BadRequestError as error:
            assert error.body["type"] == "error" and error.body["error"]["param"] == field, error
    try:
        client.with_options(api_key="not-the-key").messages.create(**asked)
        raise SystemExit("a wrong key was taken")
    except anthropic.AuthenticationError:
        pass


def responses(client):
    asked = {"model": "smol", "instructions": "You are brief.", "temperature": 0, "max_output_tokens": 24}
    whole = client.responses.create(input="What is the capital of France?", **asked)
    text = whole.output_text
    assert text and whole.status in ("completed", "incomplete") and whole.usage.total_tokens > 10, whole
    assert whole.status == "completed" or whole.incomplete_details.reason == "max_output_tokens", whole
    items = [{"role": "user", "content": [{"type": "input_text", "text": "What is the capital of France?"}]}]
    with client.responses.stream(input=items, **asked) as stream:
        events = list(stream)
    parts = [event.delta for event in events if event.type == "response.output_text.delta"]
    final = events[-1]
    assert final.type == f"response.{whole.status}", final
    assert "".join(parts) == text == final.response.output_text, (parts, text)
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")][-1] >= len(parts) + 7, events
    for wrong, field in [({"previous_response_id": "resp_1"}, "previous_response_id"), ({"max_output_tokens": -2}, "max_output_tokens"),
                         ({"input": [{"role": "nobody", "content": "x"}]}, "input[0].role")]:
        try:
            client.responses.create(**{"input": "Hi", **asked, **wrong})
            raise SystemExit(f"{wrong} was taken")
        except openai.BadRequestError as error:
            assert error.param == field, error


url, key = os.environ["DIM_URL"], os.environ["DIM_KEY"]
messages(anthropic.Anthropic(base_url=url, api_key=key, max_retries=0))
responses(openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0))
print(f"anthropic {anthropic.__version__}: messages, streaming, stop, errors; openai {openai.__version__}: responses, streaming, errors")
