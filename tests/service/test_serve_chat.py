"""Chats, for a model whose tokenizer knows how to write them down."""

import openai
import pytest
from serving_process import Serving
from tiny_export import write_export

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A service of a model with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    export = write_export(folder / "tiny")
    (export / "chat_template.jinja").write_text(TEMPLATE)
    serving = Serving(folder / "log", export)
    yield serving
    serving.close()


def test_a_chat_is_the_text_its_template_writes(server):
    messages = [{"role": "user", "content": "a whale?"}]
    asked = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 15}
    answer = server.client.chat.completions.create(**asked)
    text = server.complete("user: a whale?\nassistant: ", max_tokens=15)
    assert answer.choices[0].message.content == text.choices[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == text.usage.prompt_tokens
    chunks = list(server.client.chat.completions.create(**asked, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == text.choices[0].text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_a_chat_goes_on_in_a_session(server):
    def say(content: str):
        return server.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": content}],
            max_tokens=3,
            extra_body={"session": "chat"},
        )

    first, second = say("one"), say("two")
    read = sum(answer.usage.total_tokens for answer in (first, second))
    assert server.sessions()["chat"]["position"] == read
    assert second.usage.prompt_tokens == first.usage.prompt_tokens - 1


def test_bad_messages_are_told(server):
    for messages in ([], [{"role": "wizard", "content": "a"}], [{"role": "user", "content": 1}]):
        with pytest.raises(openai.BadRequestError, match="messages"):
            server.client.chat.completions.create(model="tiny", messages=messages)
