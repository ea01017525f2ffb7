"""jinja2 as an oracle for chat templates: chat_templates.py [--write]

Renders every conversation of tests/texts/chat.json as `transformers` does (a sandboxed environment, `trim_blocks` and
`lstrip_blocks`, `raise_exception`) and compares with what stands there; tests/real.rs holds ours against the same. With
--write, puts jinja2's rendering into the file instead.
"""

import json
import sys
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

FILE = Path(__file__).parent.parent / "texts/chat.json"


def render(conversation):
    def raise_exception(message):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(conversation["template"]).render(
        messages=conversation["messages"],
        add_generation_prompt=True,
        bos_token=conversation["bos"],
        eos_token=conversation["eos"],
    )


def main():
    conversations = json.loads(FILE.read_text(encoding="utf-8"))
    if sys.argv[1:] == ["--write"]:
        for conversation in conversations:
            conversation["rendered"] = render(conversation)
        FILE.write_text(json.dumps(conversations, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return
    for i, conversation in enumerate(conversations):
        rendered = render(conversation)
        if rendered != conversation["rendered"]:
            sys.exit(f"{FILE.name}: conversation {i}\n{rendered!r}\nbut there stands\n{conversation['rendered']!r}")
    print(f"chat templates: {len(conversations)} conversations rendered as jinja2 renders them")


if __name__ == "__main__":
    main()
