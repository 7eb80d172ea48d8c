"""Text <-> token ids: sentencepiece `tokenizer.model` (Llama 2) and Hugging Face `tokenizer.json` (Llama 3).

Text is always only text: the spelling of a special token inside it is encoded as ordinary characters. Special tokens
enter as ids, by `encode(bos=, eos=)` or `encode_parts`; the formats of conversations are in chat.py.
"""

from __future__ import annotations

import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from srlm_fast.errors import UserError

_SPACE = "\u2581"  # sentencepiece's stand-in for a space
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/=]+ \d+\n")
_PROBE = " \t a\u3000\u2460\ufb01e\u0301  \u2581\n "  # what normalisers change
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer: a file, or a folder with tokenizer.model, tokenizer.json or one *.model.

    tokenizer_config.json (bos_token, eos_token, chat_template) and chat_template.jinja beside the file are read if
    there.

    Raises:
        UserError: when there is none, or it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"tokenizer: {path} does not exist; name a tokenizer.model, a tokenizer.json or their folder")
    file = _find(path) if path.is_dir() else path
    settings = _read_settings(file.parent)
    return (JsonTokenizer if file.suffix == ".json" else SentencePieceTokenizer)(file, settings)


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UserError when a token id of the tokenizer has no row in an embedding of `vocab_size` rows."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name} has ids up to {tokenizer.vocab_size - 1} but the model's embedding has only "
            f"{vocab_size} rows (vocab_size in config.json); use the tokenizer that belongs to the model"
        )


class Tokenizer(ABC):
    """What both kinds share.

    Attributes:
        name: the file it came from.
        files: {file name in a model folder: path, or content} of all that is needed to load it again, here and in
            transformers.
        vocab_size: the highest id plus one.
        special_tokens: {text: id} of the tokens that are no text (bos, eos, ...); `decode` drops them.
        bos_id, eos_id: None where the file names none.
        named_tokens: {"bos_token": "<s>", ...} as templates want them.
        chat_template: Jinja source, or None.
        adds_space: `encode` puts a space before its text (sentencepiece's dummy prefix), which `decode` removes.
        exact: decode(encode(text)) == text for every text. False for a sentencepiece model that normalises (the round
            trip then gives the normalised text) or lacks byte pieces (unknown characters are lost), and for a
            tokenizer.json that writes spaces as U+2581 (that character, or one leading space, is lost); the byte-level
            ones of Llama 3 are exact.
    """

    vocab_size: int
    special_tokens: dict[str, int]
    adds_space: bool
    exact: bool

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.name = str(file)
        main_name = "tokenizer.json" if file.suffix == ".json" else "tokenizer.model"
        beside = {name: file.with_name(name) for name in _SIDE_FILES}
        self.files: dict[str, Path | bytes] = {main_name: file}
        self.files |= {name: path for name, path in beside.items() if path.exists()}
        self.chat_template: str | None = settings.get("chat_template")
        self.named_tokens = {key: text for key, text in settings.items() if key.endswith("_token")}
        self.bos_id, self.eos_id = self._named_id("bos"), self._named_id("eos")

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a text; bos and eos only when asked for. Lone surrogates are encoded as U+FFFD.

        Raises:
            UserError: when bos or eos is asked for and the tokenizer has none.
        """
        ids = self._encode(_well_formed(text))
        if bos:
            ids.insert(0, self.required_id("bos"))
        if eos:
            ids.append(self.required_id("eos"))
        return ids

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Ids of a sequence of texts and special token ids; neighbouring texts are joined before they are encoded."""
        joined: list[str | int] = []
        for part in parts:
            if isinstance(part, str) and joined and isinstance(joined[-1], str):
                joined[-1] += part
            else:
                joined.append(part)
        return self._encode_parts([_well_formed(part) if isinstance(part, str) else part for part in joined])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens and ids without a token (padding rows of an embedding) give nothing."""
        dropped = self._dropped
        return self._decode([i for i in ids if 0 <= i < self.vocab_size and i not in dropped])

    def required_id(self, which: str) -> int:
        """bos_id or eos_id ("bos", "eos"); UserError when there is none."""
        found = {"bos": self.bos_id, "eos": self.eos_id}[which]
        if found is None:
            raise UserError(f"tokenizer {self.name} names no {which} token; set {which}_token in tokenizer_config.json")
        return found

    @abstractmethod
    def token_id(self, piece: str) -> int | None:
        """Id of the token with this spelling in the vocabulary, or None."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _encode_parts(self, parts: list[str | int]) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @cached_property
    def _dropped(self) -> set[int]:
        return set(self.special_tokens.values())

    def _named_id(self, which: str) -> int | None:
        text = self.named_tokens.get(f"{which}_token")
        if text is None:
            return None
        found = self.token_id(text)
        if found is None:
            raise UserError(f"tokenizer_config.json: {which}_token {text!r} is not a token of {self.name}")
        self.special_tokens.setdefault(text, found)
        return found


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, by the rules of Llama 2.

    A text encoded by itself starts with the piece of a space. In "[/INST]" + encode("answer") that is the space which
    Llama 2 has there, and decode() of the answer's ids removes it again, so a response survives unchanged.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            proto = file.read_bytes()
            self._sp = SentencePieceProcessor(model_proto=proto)
            # A repeated field of a serialized message overrides: normalizer_spec (3) { add_dummy_prefix (3): false }.
            self._bare = SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        except (OSError, RuntimeError) as error:
            raise UserError(f"tokenizer: cannot read {file} as a sentencepiece model: {_one_line(error)}") from error
        n = self._sp.vocab_size()
        no_text = (i for i in range(n) if self._sp.is_control(i) or self._sp.is_unknown(i))
        self.special_tokens = {self._sp.id_to_piece(i): i for i in no_text}
        self.special_tokens |= {text: i for text, i in settings["added_tokens"].items() if i >= n}
        self.vocab_size = max(n, *(i + 1 for i in self.special_tokens.values()))
        self.adds_space = self._sp.normalize("a").startswith(_SPACE)
        byte_pieces = [self.token_id(f"<0x{byte:02X}>") for byte in range(256)]
        self.exact = None not in byte_pieces and self._bare.normalize(_PROBE) == _PROBE.replace(" ", _SPACE)
        self._literal_space = [byte_pieces[byte] for byte in _SPACE.encode()] if self.exact else []
        super().__init__(file, settings)
        for key, default in (("bos", self._sp.bos_id()), ("eos", self._sp.eos_id())):
            if getattr(self, f"{key}_id") is None and default >= 0:
                setattr(self, f"{key}_id", default)
                self.named_tokens[f"{key}_token"] = self._sp.id_to_piece(default)
        self.files.setdefault("tokenizer_config.json", self._settings())

    def _settings(self) -> bytes:
        """tokenizer_config.json for a folder that has none: without it transformers does not know this for Llama's."""
        settings = {
            **self.named_tokens,
            "unk_token": self._sp.id_to_piece(self._sp.unk_id()),
            "add_bos_token": self.bos_id is not None,
            "add_eos_token": False,
            "add_prefix_space": self.adds_space,
            "legacy": False,
            "tokenizer_class": "LlamaTokenizer",
        }
        return (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()

    def token_id(self, piece: str) -> int | None:
        found = self._sp.piece_to_id(piece)
        if found != self._sp.unk_id() or piece == self._sp.id_to_piece(found):
            return found
        return self.special_tokens.get(piece)

    def _encode(self, text: str) -> list[int]:
        if not self.exact:
            return self._sp.encode(text)
        # U+2581 itself would come back as a space, so it is spelled in bytes.
        head, *tail = text.split(_SPACE)
        ids = self._sp.encode(head)
        for part in tail:
            ids += self._literal_space + self._bare.encode(part)
        return ids

    def _encode_parts(self, parts: list[str | int]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += self._encode(part) if isinstance(part, str) else [part]
        return ids

    def _decode(self, ids: list[int]) -> str:
        return self._sp.decode(ids)


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` package; its post-processor (templates of bos and eos) is not used."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(f"{file} needs the tokenizers package: pip install tokenizers") from error
        try:
            source = file.read_text(encoding="utf-8")
            self._plain, self._joined = (tokenizers.Tokenizer.from_str(source) for _ in range(2))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"tokenizer: cannot read {file} as a tokenizer.json: {_one_line(error)}") from error
        added = self._plain.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        self.vocab_size = max(self._plain.get_vocab(with_added_tokens=True).values()) + 1
        super().__init__(file, settings)
        # `_joined` knows each special token by a spelling that no text contains, so that one call encodes both.
        mark = secrets.token_hex(8)
        self._alias = {i: f"\ue000{mark}:{i}\ue001" for i in self.special_tokens.values()}
        for i, alias in self._alias.items():
            like = added.get(i)
            flags = {"lstrip": like.lstrip, "rstrip": like.rstrip} if like else {}
            self._joined.add_tokens([tokenizers.AddedToken(alias, normalized=False, **flags)])
        self._original = {self._joined.token_to_id(alias): i for i, alias in self._alias.items()}
        for one in (self._plain, self._joined):
            one.no_truncation()
            one.no_padding()
            one.encode_special_tokens = True  # the spelling of a special token in a text is text
        start = self._encode("a")[:1]
        self.adds_space = bool(start) and self._plain.id_to_token(start[0]).startswith((_SPACE, "\u0120"))
        self.exact = self._decode(self._encode(_PROBE)) == _PROBE

    def token_id(self, piece: str) -> int | None:
        return self._plain.token_to_id(piece)

    def _encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def _encode_parts(self, parts: list[str | int]) -> list[int]:
        text = "".join(part if isinstance(part, str) else self._alias[part] for part in parts)
        return [self._original.get(i, i) for i in self._joined.encode(text, add_special_tokens=False).ids]

    def _decode(self, ids: list[int]) -> str:
        return self._plain.decode(ids, skip_special_tokens=False)


def _find(folder: Path) -> Path:
    """The tokenizer file of a folder; a tokenizer.model in tiktoken's format (Llama 3) gives way to tokenizer.json."""
    model, json_file = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.exists():
        with model.open("rb") as opened:
            if not _TIKTOKEN.match(opened.read(256)):
                return model
        if not json_file.exists():
            raise UserError(f"tokenizer: {model} is in tiktoken's format; put the model's tokenizer.json beside it")
    if json_file.exists():
        return json_file
    others = list(folder.glob("*.model"))
    if len(others) != 1:
        raise UserError(f"tokenizer: no tokenizer.model or tokenizer.json in {folder}")
    return others[0]


def _read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json: {"xxx_token": text, ..., "chat_template": source or None, "added_tokens": {text: id}}."""
    file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    try:
        raw = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
        added = raw.get("added_tokens_decoder", {})
        settings: dict[str, Any] = {"added_tokens": {entry["content"]: int(i) for i, entry in added.items()}}
        for key, value in raw.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                settings[key] = text
        template = raw.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        settings["chat_template"] = template_file.read_text(encoding="utf-8") if template_file.exists() else template
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"tokenizer: cannot read {file}: {_one_line(error)}") from error
    return settings


def _well_formed(text: str) -> str:
    """Surrogate pairs joined, lone surrogates (which JSON can hold) replaced by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
