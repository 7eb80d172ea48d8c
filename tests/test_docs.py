"""What the documents name exists."""

import re
from pathlib import Path

import pytest

from srlm_fast.config import Config, walk

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.findall(r"`([^`\n]+)`", (ROOT / "docs/paper.md").read_text(encoding="utf-8"))
KEYS = {name for name, _, _ in walk(Config())}


def test_paper_names_keys_that_exist():
    sections = {key.partition(".")[0] for key in KEYS}
    named = {name for name in NAMED if name in KEYS or re.fullmatch(rf"({'|'.join(sections)})\.\w+", name)}
    assert len(named) > 60
    assert named <= KEYS, f"docs/paper.md names unknown keys: {sorted(named - KEYS)}"


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
def test_paper_names_files_that_exist(suffix):
    named = {name for name in NAMED if name.endswith(suffix) and "/" in name}
    assert len(named) > 1
    assert not {name for name in named if not (ROOT / name).is_file()}


def test_paper_names_tests_that_exist():
    named = {name for name in NAMED if "::" in name}
    assert len(named) > 40
    for name in sorted(named):
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), (
            f"docs/paper.md: no test {name}"
        )


def test_paper_accounts_for_every_key_of_the_method():
    """All keys but those of the machine, of our own measurements and of the search for prompts."""
    others = re.compile(
        r"run_dir|seed|engine\..*|model\.(tokenizer|random_init)|.*\.tokens_per_microbatch|candidates\.shard_size"
        r"|evaluate\.(prompts|n|truth)|prompts\.(requests_per_round|max_requests)|sft\.(beta|label_smoothing)"
    )
    assert not {key for key in KEYS - set(NAMED) if not others.fullmatch(key)}
