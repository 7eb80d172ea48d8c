"""New prompts by Self-Instruct: the eight-shot request, reading its completion, and the filters.

Sources: arXiv 2401.10020, section 2.2 (6 + 2 demonstrations; ROUGE-L, keyword and length filters as Self-Instruct) and
Self-Instruct (arXiv 2212.10560) for the values of the filters.
"""

import random
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

from srlm_fast.config import PromptsConfig
from srlm_fast.errors import UserError
from srlm_fast.templates import read_template

TEMPLATE = """\
Write more tasks for this list. Each task is something a person might ask of an assistant, complete in itself and \
unlike the others in subject and form.

{tasks}"""

COUNTS = {
    "completions": "completions read",
    "cut_off": "completions that ended at the token limit, dropped whole",
    "proposed": "prompts found in the others",
    "too_short": "proposed with fewer than min_words words",
    "too_long": "proposed with more than max_words words",
    "keyword": "proposed with a word of the blacklist",
    "opening": "proposed with a forbidden opening, or that begin with punctuation or a non-ASCII character",
    "duplicate": "proposed with the text of a seed, known or accepted prompt, but for case and spacing",
    "similar": "proposed with a ROUGE-L above the threshold to a seed, known or accepted prompt",
    "accepted": "prompts accepted",
}

_ITEM = re.compile(r"^[ \t]*\d+[ \t]?[.):](?:[ \t]+|$)", re.M)


def load_template(path: str | Path | None = None) -> str:
    """Text of a task-list file, or the built-in `TEMPLATE` for None. Raises UserError without a place {tasks}."""
    return TEMPLATE if path is None else read_template(path, ("tasks",), "task-list").rstrip("\n")


def parse_completion(text: str) -> list[str]:
    """The prompts in a completion of the task list, each on one line.

    Items are told by their numbers. Text before the first number is the item that the request left open, unless it is
    an introduction (it ends in a colon). Of an item with several paragraphs the first is taken: what follows is most
    often an answer to it.
    """
    head, *items = _ITEM.split(text)
    if head.strip() and not head.rstrip().endswith(":"):
        items.insert(0, head)
    paragraphs = (re.split(r"\n[ \t]*\n", item.strip(), maxsplit=1)[0] for item in items)
    return [prompt for prompt in (" ".join(paragraph.split()) for paragraph in paragraphs) if prompt]


def rouge_tokens(text: str) -> list[str]:
    """Tokens of ROUGE without a stemmer: runs of a-z and 0-9 in the lower-case text."""
    return re.findall(r"[a-z0-9]+", text.lower())


class PromptPool:
    """Accepted prompts with the filters in front and the requests for more behind.

    What it accepts and asks for depends on its arguments and the completions added, so it is resumed by adding the same
    completions again.
    """

    def __init__(
        self,
        seeds: Sequence[str],
        *,
        known: Iterable[str] = (),
        ift_shots: int = PromptsConfig.ift_shots,
        generated_shots: int = PromptsConfig.generated_shots,
        template: str = TEMPLATE,
        min_words: int = PromptsConfig.min_words,
        max_words: int = PromptsConfig.max_words,
        blacklist: Sequence[str] = PromptsConfig.blacklist,
        forbidden_starts: Sequence[str] = PromptsConfig.forbidden_starts,
        rouge_threshold: float = PromptsConfig.rouge_threshold,
        seed: int = 0,
    ) -> None:
        """A pool without accepted prompts.

        Args:
            seeds: the IFT prompts, which serve as demonstrations and which new prompts may not resemble.
            known: other prompts that new ones may not resemble (held-out ones, those of earlier iterations).
        """
        self.seeds = list(seeds)
        self.accepted: list[str] = []
        self.counts = dict.fromkeys(COUNTS, 0)
        self.ift_shots, self.generated_shots, self.template, self.seed = ift_shots, generated_shots, template, seed
        self.min_words, self.max_words, self.rouge_threshold = min_words, max_words, rouge_threshold
        words = "|".join(r"\s+".join(map(re.escape, entry.split())) for entry in blacklist)
        self._blacklist = re.compile(rf"\b(?:{words})\b", re.I) if words else None
        self._openings = tuple(start.lower() for start in forbidden_starts)
        self._ids: dict[str, str] = {}  # token -> the character it is compared as
        self._texts: set[str] = set()
        self._coded: list[str] = []
        for prompt in (*self.seeds, *known):
            self._remember(prompt)
        if len(self.seeds) < ift_shots + generated_shots:
            raise UserError(
                f"{len(self.seeds)} IFT prompts are fewer than prompts.ift_shots {ift_shots} + prompts.generated_shots "
                f"{generated_shots}; lower these or add IFT data"
            )

    def shots(self, index: int) -> list[tuple[str, int]]:
        """The demonstrations of request `index`: ("seeds" or "accepted", place there), drawn by (seed, index).

        While fewer than `generated_shots` prompts are accepted, IFT prompts fill their places.
        """
        rng = random.Random(f"{self.seed}/{index}")
        accepted = rng.sample(range(len(self.accepted)), min(self.generated_shots, len(self.accepted)))
        seeds = rng.sample(range(len(self.seeds)), self.ift_shots + self.generated_shots - len(accepted))
        shots = [*(("accepted", place) for place in accepted), *(("seeds", place) for place in seeds)]
        rng.shuffle(shots)
        return shots

    def request(self, index: int) -> str:
        """The text of request `index`: its demonstrations from the pool as it is, in drawn order."""
        shots = [getattr(self, kind)[place] for kind, place in self.shots(index)]
        lines = [f"{number}. {' '.join(shot.split())}" for number, shot in enumerate(shots, 1)]
        return self.template.replace("{tasks}", "\n".join([*lines, f"{len(shots) + 1}."]))

    def add(self, completion: str, finish_reason: str = "stop") -> list[str]:
        """Takes in a completion; returns the prompts accepted from it, in order."""
        self.counts["completions"] += 1
        if finish_reason == "length":
            self.counts["cut_off"] += 1
            return []
        accepted = []
        for prompt in parse_completion(completion):
            self.counts["proposed"] += 1
            rule = self.rejects(prompt)
            self.counts[rule or "accepted"] += 1
            if rule is None:
                self._remember(prompt)
                accepted.append(prompt)
                self.accepted.append(prompt)
        return accepted

    def rejects(self, prompt: str) -> str | None:
        """The first rule of `COUNTS` that rejects a prompt, or None."""
        n_words = len(prompt.split())
        if n_words < self.min_words:
            return "too_short"
        if n_words > self.max_words:
            return "too_long"
        if self._blacklist and self._blacklist.search(prompt):
            return "keyword"
        if prompt.lower().startswith(self._openings) or prompt[0] in string.punctuation or not prompt[0].isascii():
            return "opening"
        if _same(prompt) in self._texts:
            return "duplicate"
        return "similar" if self.similarity(prompt) > self.rouge_threshold else None

    def similarity(self, prompt: str) -> float:
        """Highest ROUGE-L F-measure to a seed, known or accepted prompt; 0.0 where none reaches `rouge_threshold`.

        F = 2 LCS / (n + m) of the token lists, which is RapidFuzz's normalized Indel similarity.
        """
        try:
            from rapidfuzz import process
            from rapidfuzz.distance import Indel, LCSseq
        except ImportError:
            raise UserError("the ROUGE-L filter needs RapidFuzz: pip install rapidfuzz") from None
        coded = self._encode(prompt)
        scorer = Indel.normalized_similarity
        nearest = process.extractOne(coded, self._coded, scorer=scorer, score_cutoff=self.rouge_threshold)
        if not coded or nearest is None:
            return 0.0
        return 2 * LCSseq.similarity(coded, nearest[0]) / (len(coded) + len(nearest[0]))

    def _remember(self, prompt: str) -> None:
        self._texts.add(_same(prompt))
        self._coded.append(self._encode(prompt))

    def _encode(self, prompt: str) -> str:
        """Tokens as characters, one each, so that they are compared as a string."""
        return "".join(self._ids.setdefault(token, _character(len(self._ids))) for token in rouge_tokens(prompt))


def _character(number: int) -> str:
    """Characters in order, past the surrogates."""
    return chr(number if number < 0xD800 else number + 0x800)


def _same(prompt: str) -> str:
    return " ".join(prompt.lower().split())
