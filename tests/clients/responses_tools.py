"""Tools by OpenAI's own client under `/v1/responses` of `dim-host serve`: a call that must come, whole and streamed, one by its name, what
came of it given back, a class as the form of an answer, what is wrong. run.py starts the server with a template that has a place for
tools; the model is far too small to call any by itself, so the calls are those that the grammar enforces.
"""

import json
import os
from typing import Literal

import openai
from pydantic import BaseModel

ASK = [{"role": "user", "content": "What is the weather like in Paris today?"}]


class City(BaseModel):
    name: Literal["Paris", "London", "Rome"]
    is_capital: bool


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "name": name, "description": f"The {name}", "parameters": parameters, "strict": True}


WEATHER = tool("weather", city={"type": "string", "enum": ["Paris", "Oslo"]}, unit={"type": "string", "enum": ["C", "F"]})
TIME = tool("time", zone={"type": "string", "maxLength": 8})


def check(client):
    asked = {"model": "any", "input": ASK, "instructions": "You are brief.", "temperature": 0, "max_output_tokens": 96}
    must = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    whole = client.responses.create(**asked, **must)
    (call,) = whole.output
    arguments = json.loads(call.arguments)
    assert whole.status == "completed" and call.type == "function_call" and call.call_id and call.name == "weather", whole
    assert arguments["city"] in ["Paris", "Oslo"] and arguments["unit"] in ["C", "F"] and len(arguments) == 2, arguments
    assert whole.tools[0].name == "weather" and whole.tools[0].parameters == WEATHER["parameters"], whole
    assert (whole.tool_choice, whole.parallel_tool_calls, whole.instructions) == ("required", False, "You are brief."), whole
    print("call:", call.name, call.arguments)

    with client.responses.stream(**asked, **must) as stream:
        events = list(stream)
        final = stream.get_final_response()
    (streamed,) = final.output
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments) and streamed.id and streamed.status == "completed", final
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(event.delta for event in deltas) == call.arguments and len(deltas) > 3, deltas
    assert all(event.item_id == streamed.id and event.output_index == 0 for event in deltas), deltas
    kinds = [event.type.removeprefix("response.") for event in events if event not in deltas]
    begin, end = ["created", "in_progress", "output_item.added"], ["function_call_arguments.done", "output_item.done", "completed"]
    assert kinds == begin + end, kinds
    assert [event.sequence_number for event in client.responses.create(**asked, **must, stream=True)] == list(range(len(events)))

    named = client.responses.create(**asked, tools=[WEATHER, TIME], tool_choice={"type": "function", "name": "time"}, parallel_tool_calls=False)
    (call,) = named.output
    assert call.name == "time" and list(json.loads(call.arguments)) == ["zone"] and len(named.tools) == 2, named

    # the model's answer to what came of it: text, or a call of its own; the client's own objects go back as they came
    history = [*ASK, *named.output, {"type": "function_call_output", "call_id": call.call_id, "output": "12:00"}]
    for choice in ["auto", "none"]:
        answer = client.responses.create(**{**asked, "input": history}, tools=[WEATHER, TIME], tool_choice=choice)
        kinds = {item.type for item in answer.output}
        assert kinds <= ({"message", "function_call"} if choice == "auto" else {"message"}) and kinds, answer
    assert client.responses.create(**{**asked, "input": history}).output_text

    parsed = client.responses.parse(**asked, text_format=City)
    assert isinstance(parsed.output_parsed, City) and parsed.status == "completed", parsed
    print("as a class:", parsed.output_parsed)

    orphan = [*ASK, {"type": "function_call_output", "call_id": "x", "output": "5"}]
    for wrong, field in [
        ({"tools": [{**WEATHER, "name": "two words"}]}, "tools[0].name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": orphan}, "input[1].call_id"),
        ({**must, "text": {"format": {"type": "json_object"}}}, "text.format.schema"),
    ]:
        try:
            client.responses.create(**{**asked, **wrong})
            raise SystemExit(f"{wrong} was taken")
        except openai.BadRequestError as error:
            assert error.param == field, error


check(openai.OpenAI(base_url=os.environ["DIM_URL"] + "/v1", api_key=os.environ["DIM_KEY"], max_retries=0))
print(f"openai {openai.__version__}: responses: a tool that must be called, whole and streamed, by its name; what came of it; a class; errors")
