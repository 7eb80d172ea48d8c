"""Configuration: layers, types, refusals by name."""

import pytest

from srlm_fast.config import Config, describe, input_paths, load_config, results_keys, walk
from srlm_fast.errors import UserError


def test_file_then_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 7\noasst:\n  paths: data/a.jsonl\ndpo:\n  lr: 1e-4\n  epochs: 3\nmodel:\n  path: m0\n")
    config = load_config(file, ["dpo.epochs=5", "candidates.temperature=1", "model.tokenizer=none"])
    assert (config.seed, config.dpo.lr, config.dpo.epochs, config.candidates.temperature) == (7, 1e-4, 5, 1.0)
    assert config.model.path == str(tmp_path / "m0"), "a path in a file is relative to the file"
    assert input_paths(config)["oasst.paths"] == [tmp_path / "data/a.jsonl"]
    for none in ("null", "none"):
        config = load_config(file, [f"model.tokenizer={none}", f"dpo.max_steps={none}"])
        assert config.model.tokenizer is None and config.dpo.max_steps is None


def test_options_of_the_loss_are_merged_by_name(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("dpo:\n  loss: simpo\n  loss_options: {gamma: 0.5, margin: 1}\n")
    config = load_config(file, ["dpo.loss_options.gamma=2", "dpo.loss_options={alpha: 1e-3, margin: none}"])
    assert config.dpo.loss_options == {"gamma": 2, "alpha": "1e-3"} and config.sft.loss_options == {}
    assert Config().dpo.loss_options == {}, "defaults are not shared"
    assert results_keys(config)["dpo.loss_options"] == {"gamma": 2, "alpha": "1e-3"}
    assert load_config(None, ["dpo.loss=dpo + 0.2 * nll"]).dpo.loss == "dpo + 0.2 * nll"


def test_defaults_are_the_papers():
    config = Config()
    values = (
        config.oasst.ift_examples,
        config.eft.max_examples,
        config.candidates.n,
        config.candidates.temperature,
        config.candidates.top_p,
        config.judge.n,
        config.judge.temperature,
        config.judge.top_p,
        config.prompts.temperature,
        config.prompts.top_p,
        config.prompts.ift_shots,
        config.prompts.generated_shots,
        config.sft.lr,
        config.sft.min_lr,
        config.sft.schedule,
        config.sft.batch_size,
        config.dpo.lr,
        config.dpo.min_lr,
        config.dpo.batch_size,
        config.dpo.beta,
        config.model.dropout,
        config.iterations,
    )
    assert values == (
        3200,
        1630,
        4,
        0.7,
        0.9,
        3,
        0.7,
        0.9,
        0.6,
        0.9,
        6,
        2,
        5.5e-6,
        1.1e-6,
        "cosine",
        16,
        1e-6,
        1e-7,
        16,
        0.1,
        0.1,
        2,
    )
    assert load_config() == config, "and pass the checks"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("dpo.learning_rate=1", "unknown key 'dpo.learning_rate'"),
        ("dpo.betta=1", "did you mean 'dpo.beta'"),
        ("lr=1", "did you mean 'sft.lr'"),
        ("dpo.lr=fast", "dpo.lr='fast': must be float"),
        ("sft.epochs=1.5", "must be int"),
        ("model.random_init=3", "must be bool"),
        ("judge.mode=cott", "must be one of cot, expected"),
        ("sft=3", "sft is a section"),
        ("dpo.loss_options=3", "dpo.loss_options is a mapping of names to values, got 3"),
        ("dpo.loss_options.gamma=[1]", "dpo.loss_options.gamma=.*must be a number, a word, true, false or none"),
        ("sft.epochs", "not of the form key=value"),
        ("candidates.top_p=0", "above 0 and at most 1"),
        ("judge.n=0", "judge.n=0: must be at least 1"),
        ("sft.lr=-1", "must be a number and not negative"),
        ("sft.lr=.nan", "must be a number and not negative"),
        ("sft.lr=1e-6", "sft.min_lr=1.1e-06, the learning rate at the end, is above sft.lr=1e-06; lower it"),
        ("model.dropout=1", "must be below 1"),
        ("dpo.adam_beta2=1", "dpo.adam_beta2=1.0: must be below 1"),
        ("dpo.max_steps=0", "must be at least 1"),
        ("candidates.n=1", "must be at least 2"),
        ("judge.min_valid=4", "judge.min_valid=4: must be at most judge.n=3"),
        ("judge.max_new_tokens=4096", "leaves no room for a prompt in model.max_seq_len=4096"),
        ("sft.tokens_per_microbatch=100", "smaller than the longest example .* of 4096 tokens"),
        ("dpo.tokens_per_microbatch=5000", "smaller than the longest pair .* of 5120 tokens"),
    ],
)
def test_bad_values_are_refused_by_name(override, says):
    with pytest.raises(UserError, match=says):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "must hold a mapping"),
        ("dpo: 3", "section"),
        ("dpo.lr: 1", r"unknown key 'dpo.lr'; write it inside its section, dpo: \{lr: ...\}"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, says):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        load_config(file)
    with pytest.raises(UserError, match="cannot read the configuration"):
        load_config(tmp_path / "absent.yaml")


def test_every_key_is_documented_and_operational_keys_do_not_count():
    assert all(spec.metadata["doc"] for _, spec, _ in walk(Config()))
    assert all(name in describe(Config()) for name, _, _ in walk(Config()))
    one, other = load_config(None, ["run_dir=a", "iterations=3"]), load_config(None, ["run_dir=b"])
    assert results_keys(one) == results_keys(other)
    assert results_keys(load_config(None, ["seed=1"])) != results_keys(one)
