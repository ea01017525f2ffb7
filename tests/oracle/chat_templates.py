"""jinja2 and Python as oracles for chat templates: chat_templates.py [--write]

Renders every conversation of tests/texts/chat.json as `transformers` does (a sandboxed environment, `trim_blocks` and
`lstrip_blocks`, `raise_exception`, `tojson` by json.dumps, `{% generation %}`) and compares with what stands there;
tests/real.rs holds ours against the same. Then every date of tests/texts/dates.json, which src/host/template/dates.rs reads.
With --write, puts jinja2's and Python's texts into the files instead.
"""

import datetime
import json
import os
import sys
import time
from pathlib import Path

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEXTS = Path(__file__).parent.parent / "texts"
CHAT = TEXTS / "chat.json"
DATES = TEXTS / "dates.json"

# the first and the last days of years and weeks, noon and midnight, hours of one and of two digits
TIMES = ["2024-07-26T17:05:09.000456", "2023-01-01T00:00:00", "2024-12-30T12:00:59.5", "2026-11-08T09:30:00", "1999-12-31T23:59:59.999999"]
# every directive that Python documents, those of its C library that templates use, and what is none
FORMATS = [
    *(f"%{letter}" for letter in "aAwdbBmyYHIpMSfzZjUWcxX%GuVCDeFghklnPrRstT"),
    *("%-d", "%-m/%-d/%y", "%_H", "%^a", "%-I:%M %p", "%Ey %Od", "%d %b %Y", "%Y-%m-%dT%H:%M:%S.%fZ", "100%", "%", "%é", "no date"),
]


class Generation(Extension):
    """The marks of what a model is trained on, which transformers reads as a call block of nothing."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller):
        return caller()


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(conversation):
    def raise_exception(message):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation])
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    return environment.from_string(conversation["template"]).render(
        messages=conversation["messages"],
        add_generation_prompt=True,
        bos_token=conversation["bos"],
        eos_token=conversation["eos"],
    )


def dates():
    """What strftime_now gives at those times: `datetime.now()` has no time zone."""
    os.environ["TZ"] = "UTC"
    time.tzset()
    moments = [datetime.datetime.fromisoformat(moment) for moment in TIMES]
    pairs = [(moment, format) for moment in moments for format in FORMATS]
    return [{"time": moment.isoformat(), "format": format, "written": moment.strftime(format)} for moment, format in pairs]


def write(path, values):
    path.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main():
    conversations = json.loads(CHAT.read_text(encoding="utf-8"))
    if sys.argv[1:] == ["--write"]:
        for conversation in conversations:
            conversation["rendered"] = render(conversation)
        write(CHAT, conversations)
        write(DATES, dates())
        return
    for i, conversation in enumerate(conversations):
        rendered = render(conversation)
        if rendered != conversation["rendered"]:
            sys.exit(f"{CHAT.name}: conversation {i}\n{rendered!r}\nbut there stands\n{conversation['rendered']!r}")
    print(f"chat templates: {len(conversations)} conversations rendered as jinja2 renders them")
    # how a C library writes some of them is its own; that of Linux is the one that the file is of
    if sys.platform == "linux":
        there = json.loads(DATES.read_text(encoding="utf-8"))
        for date in dates():
            if date not in there:
                sys.exit(f"{DATES.name}: there is no {date}")
        print(f"chat templates: {len(there)} dates written as Python writes them")


if __name__ == "__main__":
    main()
