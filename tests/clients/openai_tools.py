"""Tools by OpenAI's own client against `dim-host serve`: a call that must come, whole and streamed, one by its name, what came of it,
what is wrong. run.py starts the server with a template of the Hermes form: SmolLM2's own has no place for tools. The model is far too
small to call any by itself, so the calls are those that the grammar enforces.
"""

import json
import os

import openai

ASK = [{"role": "user", "content": "What is the weather like in Paris today?"}]


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"The {name}", "parameters": parameters}}


WEATHER = tool("weather", city={"type": "string", "enum": ["Paris", "Oslo"]}, unit={"type": "string", "enum": ["C", "F"]})
TIME = tool("time", zone={"type": "string", "maxLength": 8})


def streamed(parts):
    """The calls of a stream put together as clients do it: by index, the name once, the arguments piece by piece."""
    calls, n_pieces, finish = {}, 0, None
    for part in parts:
        for choice in part.choices:
            finish = choice.finish_reason or finish
            for delta in choice.delta.tool_calls or []:
                if delta.index not in calls:
                    assert delta.id and delta.type == "function" and delta.function.name, delta
                    calls[delta.index] = [delta.id, delta.function.name, ""]
                else:
                    assert delta.id is None and delta.function.name is None, delta
                calls[delta.index][2] += delta.function.arguments or ""
                n_pieces += 1
    return calls, n_pieces, finish


def check(client):
    create = lambda **more: client.chat.completions.create(**{"model": "any", "messages": ASK, "temperature": 0, "max_tokens": 96, **more})
    whole = create(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None, whole
    (call,) = whole.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.type == "function" and call.id and call.function.name == "weather", call
    assert arguments["city"] in ["Paris", "Oslo"] and arguments["unit"] in ["C", "F"] and len(arguments) == 2, arguments
    print("call:", call.function.name, call.function.arguments)

    calls, n_pieces, finish = streamed(create(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, stream=True))
    assert finish == "tool_calls" and list(calls) == [0] and n_pieces > 3, (calls, n_pieces, finish)
    assert calls[0][1:] == ["weather", call.function.arguments], (calls, call)

    named = create(tools=[WEATHER, TIME], tool_choice={"type": "function", "function": {"name": "time"}}, parallel_tool_calls=False)
    (call,) = named.choices[0].message.tool_calls
    assert call.function.name == "time" and list(json.loads(call.function.arguments)) == ["zone"], call

    # the model's answer to what came of it: text, or a call of its own
    made = {"id": call.id, "type": "function", "function": {"name": "time", "arguments": call.function.arguments}}
    history = [*ASK, {"role": "assistant", "content": None, "tool_calls": [made]}]
    history.append({"role": "tool", "tool_call_id": call.id, "content": "12:00"})
    for choice in ["auto", "none"]:
        answer = create(messages=history, tools=[WEATHER, TIME], tool_choice=choice).choices[0]
        assert answer.message.content or answer.message.tool_calls, answer
        assert choice == "auto" or answer.message.tool_calls is None, answer
    assert create(messages=history).choices[0].message.content

    bad = {**WEATHER, "function": {**WEATHER["function"], "name": "two words"}}
    for wrong, field in [
        ({"tools": [bad]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format.schema"),
    ]:
        try:
            create(**wrong)
            raise SystemExit(f"{wrong} was taken")
        except openai.BadRequestError as error:
            assert error.param == field, error


check(openai.OpenAI(base_url=os.environ["DIM_URL"] + "/v1", api_key=os.environ["DIM_KEY"], max_retries=0))
print(f"openai {openai.__version__}: a tool that must be called, whole and streamed, by its name; what came of it; errors")
