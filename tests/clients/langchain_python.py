"""LangChain's ChatOpenAI against `dim-host serve`: a chain, streaming, batches, usage, what is wrong. run.py starts the server."""

import os
from importlib.metadata import version

import openai
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    base_url=os.environ["DIM_URL"] + "/v1", api_key=os.environ["DIM_KEY"], model="smol", temperature=0, max_tokens=24, max_retries=0
)
chain = ChatPromptTemplate.from_messages([("system", "You are brief."), ("human", "What is the capital of {country}?")]) | model

answer = chain.invoke({"country": "France"})
assert len(answer.content) > 10, answer
assert answer.usage_metadata["output_tokens"] > 0 and answer.response_metadata["finish_reason"] in ("stop", "length"), answer
assert "".join(part.content for part in chain.stream({"country": "France"})) == answer.content
# several at once, on two slots
assert [a.content for a in chain.batch([{"country": "France"}] * 4)][0] == answer.content
middle = answer.content[len(answer.content) // 2 :][:5]
stopped = (chain.first | model.bind(stop=[middle])).invoke({"country": "France"})
assert stopped.content == answer.content[: answer.content.find(middle)], stopped
try:
    model.bind(top_p=7).invoke("Hi")
    raise SystemExit("a wrong field was taken")
except openai.BadRequestError as error:
    assert error.param == "top_p", error
print(f"langchain-openai {version('langchain-openai')}: a chain, streaming, a batch, stop, errors")
