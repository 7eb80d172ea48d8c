"""Conversations -> token ids: Llama 2's [INST] format, a plain one, and a model's own Jinja chat template.

A conversation is a list of {"role": "system" | "user" | "assistant", "content": str}. A prompt ends where the
assistant's next turn starts; a response is encoded by itself and ends in the id that ends a turn.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from srlm_fast.errors import UserError
from srlm_fast.tokenizer import Tokenizer

Message = dict[str, str]


def chat_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """The chat format called "llama2", "plain" or "template" (the tokenizer's own chat_template).

    Raises:
        UserError: for another name, or when the tokenizer lacks what the format needs (an eos token, a template).
    """
    if name not in _FORMATS:
        raise UserError(f"unknown chat format {name!r}; known: {', '.join(_FORMATS)}")
    return _FORMATS[name](tokenizer)


class ChatFormat(ABC):
    """How messages become ids.

    Attributes:
        end_id: the token that ends an assistant's turn.
        stop_ids: end_id and eos, on which generation stops.
        glue: text of the format between the prompt and a response, encoded with the response (empty where the tokenizer
            itself puts a space before a text).
    """

    def __init__(self, tokenizer: Tokenizer, end_id: int | None = None, glue: str = " ") -> None:
        self.tokenizer = tokenizer
        self.end_id = tokenizer.required_id("eos") if end_id is None else end_id
        self.stop_ids = tuple(dict.fromkeys(i for i in (self.end_id, tokenizer.eos_id) if i is not None))
        self.glue = "" if tokenizer.adds_space and glue == " " else glue
        self._spelling = {i: text for text, i in tokenizer.special_tokens.items()}

    @abstractmethod
    def parts(self, messages: Sequence[Message]) -> list[str | int]:
        """The prompt as texts and special token ids.

        Raises:
            UserError: when the messages are none, malformed, or in an order that the format does not know.
        """

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to where the assistant's next turn starts, with the bos that the format wants."""
        return self.tokenizer.encode_parts(self.parts(messages))

    def encode_text(self, text: str) -> list[int]:
        """Ids of the beginning of a response."""
        return self.tokenizer.encode(self.glue + text)

    def encode_response(self, text: str) -> list[int]:
        """Ids of a whole response; the last one is end_id."""
        return [*self.encode_text(text), self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response's ids: decode(encode_response(text)) == text."""
        return self.tokenizer.decode(ids).removeprefix(self.glue)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt as text with its special tokens spelled out, to be looked at."""
        return "".join(part if isinstance(part, str) else self._spelling[part] for part in self.parts(messages))


class Llama2Format(ChatFormat):
    """<s>[INST] <<SYS>>...<</SYS>> question [/INST] answer </s><s>[INST] question [/INST], as Llama 2 was trained.

    Contents are stripped as in Meta's code; a new response is not, so that it survives unchanged.
    """

    def parts(self, messages: Sequence[Message]) -> list[str | int]:
        system, turns, last = _dialogue(messages)
        bos, eos = self.tokenizer.required_id("bos"), self.tokenizer.required_id("eos")
        head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system is not None else ""
        parts: list[str | int] = []
        for user, assistant in turns:
            parts += [bos, f"[INST] {(head + user).strip()} [/INST] {assistant.strip()} ", eos]
            head = ""
        return [*parts, bos, f"[INST] {(head + last).strip()} [/INST]"]


class PlainFormat(ChatFormat):
    """bos, "System: ...\\nUser: ...\\nAssistant:", and after each answer eos; for models never taught a chat format."""

    def parts(self, messages: Sequence[Message]) -> list[str | int]:
        system, turns, last = _dialogue(messages)
        parts: list[str | int] = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        if system is not None:
            parts.append(f"System: {system}\n")
        for user, assistant in turns:
            parts += [f"User: {user}\nAssistant: {assistant}", self.tokenizer.required_id("eos")]
        return [*parts, f"User: {last}\nAssistant:"]


class TemplateFormat(ChatFormat):
    """The Jinja chat_template of a model, in a sandbox, with the helpers that templates expect.

    Special tokens that the template writes become ids; the same spelling inside a message stays text. The end of a turn
    and the text before a response are read off the template by rendering an example.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise UserError(f"tokenizer {tokenizer.name} has no chat_template; choose the chat format llama2 or plain")
        self._tokenizer = tokenizer
        self._specials = tokenizer.special_tokens
        self._template = _compile(tokenizer.chat_template)
        self._mark = f"\ue002{secrets.randbits(64)}:"
        self._special = re.compile("|".join(map(re.escape, sorted(self._specials, key=len, reverse=True))) or "(?!)")
        self._hidden = re.compile(re.escape(self._mark) + "(\\d+)\ue003")
        super().__init__(tokenizer, *self._probe())

    def parts(self, messages: Sequence[Message]) -> list[str | int]:
        _check_messages(messages)
        return self._split(self._render(messages, add_generation_prompt=True))

    def encode_conversation(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a whole conversation, its last reply among them, as the template writes it."""
        _check_messages(messages)
        return self.tokenizer.encode_parts(self._split(self._render(messages, add_generation_prompt=False)))

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        hidden = [
            {key: self._special.sub(self._hide, value) if key != "role" else value for key, value in message.items()}
            for message in messages
        ]
        try:
            return self._template(
                messages=hidden,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokenizer.named_tokens,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise UserError(f"chat_template of {self._tokenizer.name}: {error}") from error

    def _hide(self, match: re.Match[str]) -> str:
        return f"{self._mark}{self._specials[match[0]]}\ue003"

    def _split(self, rendered: str) -> list[str | int]:
        """Texts and ids; what a message spelled like a special token is put back as text."""
        spelled = {i: text for text, i in self._specials.items()}
        parts: list[str | int] = []
        at = 0
        for match in [*self._special.finditer(rendered), None]:
            text = rendered[at : match.start() if match else None]
            parts.append(self._hidden.sub(lambda found: spelled[int(found[1])], text))
            if match:
                parts.append(self._specials[match[0]])
                at = match.end()
        return [part for part in parts if part != ""]

    def _probe(self) -> tuple[int | None, str]:
        """(the special token after an answer, the blanks before it); (None, "") parts that the template has not."""
        question, answer = {"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}
        prompt = self._render([question], add_generation_prompt=True)
        head, _, tail = self._render([question, answer], add_generation_prompt=False).rpartition("Answer.")
        end = self._special.search(tail)
        glue = head.removeprefix(prompt) if head.startswith(prompt) else ""
        return self._specials[end[0]] if end else None, "" if glue.strip() else glue


_FORMATS: dict[str, Callable[[Tokenizer], ChatFormat]] = {
    "llama2": Llama2Format,
    "plain": PlainFormat,
    "template": TemplateFormat,
}


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise UserError("a conversation has no messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"message {i} of a conversation is not role and content, both text: {str(message)[:80]}")


def _dialogue(messages: Sequence[Message]) -> tuple[str | None, list[tuple[str, str]], str]:
    """(system message, answered turns, last user message) of a strictly alternating conversation."""
    _check_messages(messages)
    roles = [message["role"] for message in messages]
    contents = [message["content"] for message in messages]
    system = contents.pop(0) if roles[0] == "system" else None
    start = len(roles) - len(contents)
    for i, role in enumerate(roles[start:], start):
        if role != ("user", "assistant")[(i - start) % 2]:
            raise UserError(f"message {i} of a conversation has role {role!r}; user and assistant must take turns")
    if len(contents) % 2 == 0:
        raise UserError("a conversation to be answered must end with a user's message")
    return system, list(zip(contents[:-1:2], contents[1::2])), contents[-1]


def _compile(source: str) -> Callable[..., str]:
    """A chat template as a function of its variables; it can reach nothing but these and the helpers below."""
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError("the chat format template needs the jinja2 package: pip install jinja2") from error

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} only marks the assistant's text; here it is that text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        epoch = os.environ.get("SOURCE_DATE_EPOCH")  # set it where a prompt with a date must stay the same
        return time.strftime(form, time.gmtime(int(epoch)) if epoch else time.localtime())

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    try:
        return environment.from_string(source).render
    except TemplateError as error:
        raise UserError(f"chat_template is not valid Jinja, line {getattr(error, 'lineno', '?')}: {error}") from error
