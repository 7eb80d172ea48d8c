"""What the documents name exists, and what the code writes is named in docs/formats.md."""

import json
import re
from pathlib import Path

import pytest
from training_case import build

from srlm_fast import pairs, summary
from srlm_fast.config import Config, lookup, walk
from srlm_fast.config.evaluate import TASKS, EvaluateRunConfig, EvaluationJudgeConfig
from srlm_fast.data import Example, RankedPrompt, formats, oasst, prompts
from srlm_fast.engine.base import Completion
from srlm_fast.evaluate import Ranked, judge_metrics
from srlm_fast.evaluation.mt_bench import mean_ratings
from srlm_fast.head_to_head import Verdict, rates
from srlm_fast.judge import Judgement
from srlm_fast.losses import LOSSES
from srlm_fast.losses.margins import margins
from srlm_fast.losses.options import options_of
from srlm_fast.rollout import answer
from srlm_fast.rundir import FORMAT_VERSION, RunDir

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


@pytest.mark.parametrize(
    ("document", "least"), [("paper.md", 40), ("losses.md", 5), ("trainer.md", 3), ("methods.md", 10)]
)
def test_documents_name_tests_that_exist(document, least):
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`([^`\n]+)`", text) if "::" in name}
    assert len(named) > least
    for name in sorted(named):
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), (
            f"docs/{document}: no test {name}"
        )


def test_paper_accounts_for_every_key_of_the_method():
    """All keys but those of the machine, of our own measurements and of the search for prompts."""
    others = re.compile(
        r"run_dir|save_by|gpus|seed|kernels"
        r"|(engine|parallel|lora)\..*|model\.(tokenizer|random_init)|.*\.tokens_per_microbatch"
        r"|candidates\.(shard_size|schedule)|judge\.endpoint\w*"
        r"|evaluate\.(prompts|n|truth)|prompts\.(requests_per_round|max_requests)"
        r"|(meta_judge|temporal|guards)\..*"
        r"|sft\.(beta|label_smoothing|loss_options)|(sft|dpo)\.(keep_last|checkpoint_in_background)"
    )
    assert not {key for key in KEYS - set(NAMED) if not others.fullmatch(key)}


def test_methods_names_every_key_of_a_method_with_its_default():
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+\.\w+)", text))
    own = {key for key in KEYS if re.match(r"(meta_judge|temporal|guards)\.|pairs\.(?!ties|keep_truncated)", key)}
    assert own | {"reference.model"} <= named
    assert {name for name in named if name.partition(".")[0] in {key.partition(".")[0] for key in KEYS}} <= KEYS
    for name, bound in re.findall(r"^\| `(guards\.\w+)` \| (\S+) \|", text, re.M):
        assert bound == ("none" if (value := lookup(Config(), name)) is None else f"{value:g}"), name


def shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_losses_lists_every_loss_with_its_options_and_data():
    text = (ROOT / "docs/losses.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()]
    table = {row[0].strip("`"): row for row in cells if len(row) == 7 and row[0].startswith("`")}
    assert list(table) == list(LOSSES)
    common = options_of(margins)
    for name, (_, _, _, listed, data, launch, _) in table.items():
        loss = LOSSES[name]
        own = {option: shown(spec.default) for option, spec in loss.options.items() if option not in common}
        assert dict(re.findall(r"`(\w+)` ([\w.]+)", listed)) == own, name
        assert ("*margin*" in listed) == (common.keys() <= loss.options.keys()), name
        needs = ["pairs" if loss.paired else "single"] + ["ref"] * loss.needs_reference + ["labels"] * loss.needs_labels
        assert data.split(", ") == needs, name
        assert (launch == "1") == bool(loss.kind), name
    rows = {row[0].strip("`"): row[1] for row in cells if len(row) == 3}
    assert all(rows[name].startswith(shown(spec.default)) for name, spec in common.items())


def test_design_names_files_that_exist():
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    modules = {
        path.name for folder in ("srlm_fast", "kernels", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")
    }
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    assert len(named) > 30
    for name in named:
        assert (ROOT / name).is_file() if "/" in name else name in modules, name


def documented(*headings: str) -> set[str]:
    """Names in code marks below these headings of docs/formats.md."""
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^#+ (.+)\n((?:(?!#).*\n)*)", text, re.M))
    return {name for heading in headings for name in re.findall(r"`([^`\n]+)`", sections[heading])}


class Echo:
    """An engine that ends every answer at once."""

    max_batch = 1

    def submit(self, requests):
        self.requests = list(requests)

    def stream(self):
        for request in self.requests:
            yield from (Completion(request, i, [i, 2], [-1.0, -2.0], "stop") for i in range(request.n))


class Letters:
    """A chat format of two ids."""

    stop_ids = (2,)

    def encode_prompt(self, messages):
        return [1, 3]

    def decode(self, ids):
        return f"answer {ids[0]}"


def test_formats_names_every_field_of_candidates_and_pairs():
    (record,) = answer(Echo(), Letters(), Config().candidates, [{"id": "m1-000000", "prompt": "question"}], 0, 4096)
    for candidate in record["candidates"]:
        candidate.update(score=float(candidate["index"]), judgements=[vars(Judgement("Score: 4", 4.0))])
    (pair,), counts = pairs.make_pairs([record], weights_id="w")
    candidate = record["candidates"][0]
    assert {*record, *candidate} <= documented("Candidates and answers")
    assert candidate["judgements"][0].keys() <= documented("Examples, prompts and judgements")
    assert pair.keys() <= documented("Pairs")
    assert counts.keys() <= documented("phases/PHASE.json")


def test_formats_names_every_field_of_the_run_folder(tmp_path):
    run = RunDir(tmp_path / "run")
    run.open({"seed": 0}, {})
    (run / "data").mkdir()
    (run / "data/ift.jsonl").write_text("{}")
    run.finish("prepare", [run / "data"], 1.0, {})
    record = run.phase("prepare")
    (output,) = record["outputs"].values()
    assert {*record, *output} <= documented("phases/PHASE.json")
    assert json.loads((run / "run.json").read_text()).keys() <= documented("run.json")
    for module in (oasst, prompts):
        assert module.COUNTS.keys() <= documented("phases/PHASE.json")
    assert formats.COUNTS.keys() <= documented("Preference, unpaired and prompt rows")
    assert {*Example.__dataclass_fields__, *RankedPrompt.__dataclass_fields__} <= documented(
        "Examples, prompts and judgements"
    )
    operational = {name for name, spec, _ in walk(Config()) if spec.metadata["operational"]}
    assert operational <= documented("run.json")


def test_formats_names_every_metric():
    steps: list[dict] = []
    build("dpo", n=4, changes={"max_steps": 1}, on_step=steps.append).fit()
    for loss in ("kto", "bco", "simpo"):
        build(loss, n=4, changes={"max_steps": 1}, on_step=steps.append).fit()
    assert {"phase", *(name for step in steps for name in step)} <= documented("metrics.jsonl")
    metrics = {name.removesuffix("_interval") for name in judge_metrics([Ranked([1.0, 2.0], [1, 0])], bootstrap=2)}
    assert metrics <= documented("metrics.json")
    assert summary.COLUMNS.keys() <= documented("summary.json")


def test_formats_names_every_field_of_an_evaluation():
    fields = rates([Verdict("a", "win")], bootstrap=1).keys() | Verdict.__dataclass_fields__.keys()
    assert {name for name in fields if not name.endswith("_interval")} <= documented("Evaluations")
    means = mean_ratings([{"question_id": 1, "turn": 1, "score": 2.0}], [{"question_id": 1, "category": "x"}])
    assert means.keys() <= documented("Evaluations")


def test_evaluation_names_its_keys_and_tasks():
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    keys = {name for name, _, _ in walk(EvaluateRunConfig())}
    own = {name for name in keys if not name.startswith(("judge.", "engine."))}
    own |= {f"judge.{name}" for name in EvaluationJudgeConfig.__annotations__}
    named = set(re.findall(r"`([\w.]+)`", text))
    assert own <= named and set(TASKS) <= named
    sections = {name.partition(".")[0] for name in keys if "." in name}
    assert {name for name in named if re.fullmatch(rf"({'|'.join(sections)})\.(?!json)\w+", name)} <= keys


def test_formats_gives_the_versions():
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    assert f"| `format_version` of `run.json` | {FORMAT_VERSION} |" in text
    assert f"| `format` of each row | {pairs.FORMAT} |" in text


def test_formats_names_keys_that_exist():
    named = documented(*re.findall(r"^#+ (.+)$", (ROOT / "docs/formats.md").read_text(encoding="utf-8"), re.M))
    sections = {key.partition(".")[0] for key in KEYS if "." in key}
    keys = {name for name in named if re.fullmatch(rf"({'|'.join(sections)})\.(?!safetensors)\w+", name)}
    assert len(keys) > 10 and keys <= KEYS | {name for name, _, _ in walk(EvaluateRunConfig())}
