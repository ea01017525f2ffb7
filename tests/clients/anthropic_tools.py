"""Tools by Anthropic's own client against `dim-host serve`: a call that must come, whole and streamed, one by its name, what came of it
given back, how many tokens a conversation has, a form that an answer must have, what is wrong. run.py starts the server with a template
of the Hermes form: SmolLM2's own has no place for tools. The model is far too small to call any by itself, so the calls are those that
the grammar enforces.
"""

import json
import os

import anthropic

ASK = [{"role": "user", "content": "What is the weather like in Paris today?"}]


def tool(name, **properties):
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"name": name, "description": f"The {name}", "input_schema": schema}


WEATHER = tool("weather", city={"type": "string", "enum": ["Paris", "Oslo"]}, unit={"type": "string", "enum": ["C", "F"]})
TIME = tool("time", zone={"type": "string", "maxLength": 8})
ONE = {"type": "any", "disable_parallel_tool_use": True}


def check(client):
    # the temperature is no argument of the newest client any more, but still a field
    asked = {"model": "any", "messages": ASK, "max_tokens": 96, "extra_body": {"temperature": 0}}
    asked["system"] = [{"type": "text", "text": "You are brief.", "cache_control": {"type": "ephemeral"}}]
    whole = client.messages.create(**asked, tools=[WEATHER], tool_choice=ONE)
    (call,) = whole.content
    assert whole.stop_reason == "tool_use" and call.type == "tool_use" and call.id and call.name == "weather", whole
    assert call.input["city"] in ["Paris", "Oslo"] and call.input["unit"] in ["C", "F"] and len(call.input) == 2, call
    print("call:", call.name, call.input)

    with client.messages.stream(**asked, tools=[WEATHER], tool_choice=ONE) as stream:
        events = list(stream)
        final = stream.get_final_message()
    (streamed,) = final.content
    assert (streamed.name, streamed.input, final.stop_reason) == (call.name, call.input, "tool_use"), final
    pieces = [event.partial_json for event in events if event.type == "input_json"]
    assert len(pieces) > 3 and json.loads("".join(pieces)) == call.input, pieces
    kinds = [event.type for event in events if event.type not in ("input_json", "content_block_delta")]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"], kinds
    assert final.usage.output_tokens == whole.usage.output_tokens, (final, whole)

    named = client.messages.create(**asked, tools=[WEATHER, TIME], tool_choice={**ONE, "type": "tool", "name": "time"})
    (call,) = named.content
    assert call.name == "time" and list(call.input) == ["zone"], call

    # the model's answer to what came of it: text, or a call of its own; the client's own objects go back as they came
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "12:00"}]}, {"type": "text", "text": "And?"}]
    history = [*ASK, {"role": "assistant", "content": named.content}, {"role": "user", "content": results}]
    turn = {**asked, "messages": history, "tools": [WEATHER, TIME]}
    for choice in ["auto", "none"]:
        answer = client.messages.create(**turn, tool_choice={"type": choice})
        kinds = {block.type for block in answer.content}
        assert kinds <= ({"text", "tool_use"} if choice == "auto" else {"text"}) and kinds, answer
    counted = client.messages.count_tokens(model="any", messages=history, system=asked["system"], tools=[WEATHER, TIME]).input_tokens
    assert counted == answer.usage.input_tokens + answer.usage.cache_read_input_tokens, (counted, answer)
    assert 0 < client.messages.count_tokens(model="any", messages=ASK).input_tokens < counted
    # more than there is room for is no error there
    assert client.messages.count_tokens(model="any", messages=[{"role": "user", "content": "word " * 2000}]).input_tokens > 2000

    held = {"format": {"type": "json_schema", "schema": WEATHER["input_schema"]}}
    answer = client.messages.create(**{**asked, "extra_body": {"temperature": 0, "output_config": held}})
    assert json.loads(answer.content[0].text)["city"] in ["Paris", "Oslo"] and answer.stop_reason == "end_turn", answer

    orphan = [*ASK, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "5"}]}]
    for wrong, field in [
        ({"tools": [{**WEATHER, "name": "two words"}]}, "tools[0].name"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"messages": orphan}, "messages[1].content[0].tool_use_id"),
    ]:
        try:
            client.messages.create(**{**asked, **wrong})
            raise SystemExit(f"{wrong} was taken")
        except anthropic.BadRequestError as error:
            assert error.body["type"] == "error" and error.body["error"]["param"] == field, error
            assert error.body["error"]["type"] == "invalid_request_error", error


check(anthropic.Anthropic(base_url=os.environ["DIM_URL"], api_key=os.environ["DIM_KEY"], max_retries=0))
print(f"anthropic {anthropic.__version__}: a tool that must be called, whole and streamed, by its name; what came of it; counts, forms, errors")
