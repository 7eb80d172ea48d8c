"""Conversion against a tiny model in Meta's own terms (interleaved, complex rotary) and against transformers."""

from __future__ import annotations

import json
import pickle
import runpy
import struct
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_model import packed_logits

from srlm_fast.checkpoint import load_model, read_config
from srlm_fast.convert import convert
from srlm_fast.errors import UserError
from srlm_fast.tokenizer import load_tokenizer

DIM, N_HEADS, N_LAYERS, VOCAB = 64, 4, 2, 600
PARAMS = {"dim": DIM, "n_layers": N_LAYERS, "n_heads": N_HEADS, "norm_eps": 1e-6, "multiple_of": 32, "vocab_size": -1}
IDS = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(1))

Tensors = dict[str, torch.Tensor]


def meta_tensors(hidden: int = 192, n_kv_heads: int = N_HEADS, tied: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (0.1 if len(shape) == 2 else 0.02) + (len(shape) == 1)

    kv = n_kv_heads * DIM // N_HEADS
    tensors = {"tok_embeddings.weight": normal(VOCAB, DIM) * 10, "norm.weight": normal(DIM)}
    for i in range(N_LAYERS):
        shapes = {"wq": (DIM, DIM), "wk": (kv, DIM), "wv": (kv, DIM), "wo": (DIM, DIM)}
        tensors |= {f"layers.{i}.attention.{name}.weight": normal(*shape) for name, shape in shapes.items()}
        shapes = {"w1": (hidden, DIM), "w2": (DIM, hidden), "w3": (hidden, DIM)}
        tensors |= {f"layers.{i}.feed_forward.{name}.weight": normal(*shape) for name, shape in shapes.items()}
        tensors |= {f"layers.{i}.{name}.weight": normal(DIM) for name in ("attention_norm", "ffn_norm")}
    return tensors if tied else {**tensors, "output.weight": normal(VOCAB, DIM)}


def meta_logits(tensors: Tensors, ids: torch.Tensor, theta: float = 10000.0, eps: float = 1e-6) -> torch.Tensor:
    """Llama in float64 with rotary positions as complex numbers on neighbouring pairs."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    n, hd = len(ids), DIM // N_HEADS
    angles = torch.outer(torch.arange(n).double(), theta ** (-torch.arange(0, hd, 2).double() / hd))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.reshape(n, -1, hd // 2, 2)) * turns).flatten(2)

    x = w["tok_embeddings.weight"][ids]
    for i in range(N_LAYERS):
        a, f = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        y = norm(x, f"layers.{i}.attention_norm")
        q, k = (rotated(y @ w[f"{a}.{name}.weight"].T) for name in ("wq", "wk"))
        v = (y @ w[f"{a}.wv.weight"].T).reshape(n, -1, hd)
        k, v = (t.repeat_interleave(N_HEADS // t.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / hd**0.5 + torch.full((n, n), -torch.inf).triu(1)
        x = x + torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1) @ w[f"{a}.wo.weight"].T
        y = norm(x, f"layers.{i}.ffn_norm")
        y = F.silu(y @ w[f"{f}.w1.weight"].T) * (y @ w[f"{f}.w3.weight"].T)
        x = x + y @ w[f"{f}.w2.weight"].T
    return (norm(x, "norm") @ w.get("output.weight", w["tok_embeddings.weight"]).T).float()


def split(name: str, tensor: torch.Tensor, n: int, split_rows: bool) -> list[torch.Tensor]:
    """A tensor as Meta's n tensor-parallel files hold it."""
    if tensor.ndim == 1:
        return [tensor] * n
    by_columns = name.endswith(("wo.weight", "w2.weight")) or (name == "tok_embeddings.weight" and not split_rows)
    return [part.clone() for part in tensor.chunk(n, dim=1 if by_columns else 0)]


def write_meta(folder: Path, tensors: Tensors, n: int = 1, split_rows: bool = False, **params) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps({**PARAMS, **params}))
    parts = {name: split(name, tensor, n, split_rows) for name, tensor in tensors.items()}
    for i in range(n):
        content = {name: part[i] for name, part in parts.items()} | {"rope.freqs": torch.ones(8)}
        torch.save(content, folder / f"consolidated.{i:02d}.pth")
    return folder


def write_llama2c(file: Path, tensors: Tensors, version: int, context: int = 64) -> Path:
    """As llama2.c's exporters lay it out."""
    tied = "output.weight" not in tensors
    hidden, kv = tensors["layers.0.feed_forward.w1.weight"].shape[0], tensors["layers.0.attention.wk.weight"].shape[0]
    vocab = -VOCAB if version == 0 and not tied else VOCAB
    header = struct.pack("<7i", DIM, hidden, N_LAYERS, N_HEADS, kv * N_HEADS // DIM, vocab, context)
    if version:
        header = (struct.pack("<Ii", 0x616B3432, version) + header + struct.pack("B", tied)).ljust(256, b"\0")
    a = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
    f = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    order = ["attention_norm", "ffn_norm", "norm", "tok_embeddings", *a, *f]
    if version == 0:
        order = ["tok_embeddings", "attention_norm", *a, "ffn_norm", *f, "norm", "rotary"]
    chunks = [header]
    for name in order + ([] if tied else ["output"]):
        if name == "rotary":
            chunks.append(torch.zeros(2 * context * DIM // N_HEADS // 2).numpy().tobytes())
        elif name in ("norm", "tok_embeddings", "output"):
            chunks.append(tensors[f"{name}.weight"].numpy().tobytes())
        else:
            chunks += [tensors[f"layers.{i}.{name}.weight"].numpy().tobytes() for i in range(N_LAYERS)]
    file.write_bytes(b"".join(chunks))
    return file


def assert_logits(folder: Path, expected: torch.Tensor) -> None:
    from transformers import LlamaForCausalLM

    with torch.no_grad():
        ours = packed_logits(load_model(folder), [IDS.tolist()])[0]
        peer = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS[None]).logits[0]
    assert expected.abs().max() > 1
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(peer, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("n_files", "n_kv_heads", "split_rows", "tied"),
    [(1, 4, False, False), (2, 4, False, False), (4, 4, False, False), (2, 2, False, False), (2, 2, True, True)],
)
def test_meta_files_keep_their_logits(tmp_path, n_files, n_kv_heads, split_rows, tied):
    tensors = meta_tensors(n_kv_heads=n_kv_heads, tied=tied)
    params = {"n_kv_heads": n_kv_heads} if n_kv_heads != N_HEADS else {}
    source = write_meta(tmp_path / "meta", tensors, n_files, split_rows, **params)
    config = convert(source, tmp_path / "hf", max_shard_bytes=200_000)
    assert_logits(tmp_path / "hf", meta_logits(tensors, IDS))
    assert config == read_config(tmp_path / "hf") == load_model(tmp_path / "hf").config
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (VOCAB, 4096, 1e-6)
    assert config.tie_word_embeddings == tied and len(list((tmp_path / "hf").glob("*.safetensors"))) > 2


def test_meta_parameters_decide_the_shape(tmp_path):
    tensors = meta_tensors(hidden=224, n_kv_heads=1)
    changes = {"n_kv_heads": 1, "ffn_dim_multiplier": 1.3, "rope_theta": 500000.0, "vocab_size": VOCAB}
    source = write_meta(tmp_path / "meta", tensors, **changes)
    config = convert(source, tmp_path / "hf", max_position_embeddings=123)
    assert_logits(tmp_path / "hf", meta_logits(tensors, IDS, theta=500000.0))
    assert (config.intermediate_size, config.max_position_embeddings, config.rope_scaling) == (224, 123, None)
    write_meta(tmp_path / "meta", tensors, **changes, use_scaled_rope=True)
    scaling = convert(source, tmp_path / "hf").rope_scaling
    assert scaling["rope_type"] == "llama3" and scaling["factor"] == 32.0


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize(("tied", "n_kv_heads"), [(True, 4), (False, 2)])
def test_llama2c_files_keep_their_logits(tmp_path, version, tied, n_kv_heads):
    tensors = meta_tensors(hidden=100, n_kv_heads=n_kv_heads, tied=tied)
    config = convert(write_llama2c(tmp_path / "model.bin", tensors, version), tmp_path / "hf")
    assert_logits(tmp_path / "hf", meta_logits(tensors, IDS, eps=1e-5))
    assert config == read_config(tmp_path / "hf")
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (64, tied)


def test_dtypes_are_kept_or_changed(tmp_path):
    source = write_meta(tmp_path / "meta", {name: tensor.bfloat16() for name, tensor in meta_tensors().items()})
    convert(source, tmp_path / "same")
    convert(source, tmp_path / "wide", dtype=torch.float32)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("same", "wide")]
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.01)
    for a, b in zip(*(load_model(tmp_path / name).parameters() for name in ("same", "wide"))):
        assert torch.equal(a, b)


def test_the_tokenizer_comes_along(tmp_path, spm_folder):
    source = write_meta(tmp_path / "meta", meta_tensors())
    (tmp_path / "tokenizer.model").write_bytes((spm_folder / "tokenizer.model").read_bytes())  # Meta's own layout
    config = convert(source, tmp_path / "hf")
    assert load_tokenizer(tmp_path / "hf").encode("Good day.") == load_tokenizer(spm_folder).encode("Good day.")
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    small = write_meta(tmp_path / "small", {**meta_tensors(), "tok_embeddings.weight": torch.zeros(500, DIM)})
    with pytest.raises(UserError, match="lm_head.weight has shape .600, 64., its parameters ask for .500, 64."):
        convert(small, tmp_path / "x")
    write_meta(small, {name: t[:500] if len(t) == VOCAB else t for name, t in meta_tensors().items()})
    with pytest.raises(UserError, match="has ids up to 599 but the model's embedding has only 500 rows"):
        convert(small, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------------------ refusals


class Evil:
    """Unpickled it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("save", [torch.save, lambda content, file: Path(file).write_bytes(pickle.dumps(content))])
def test_a_pickle_with_code_is_not_run(tmp_path, save):
    source = write_meta(tmp_path / "meta", meta_tensors())
    save({**meta_tensors(), "norm.weight": Evil(tmp_path / "was run")}, source / "consolidated.00.pth")
    with pytest.raises(UserError, match="consolidated.00.pth: (holds more than plain tensors|cannot be read)"):
        convert(source, tmp_path / "hf")
    assert not (tmp_path / "was run").exists() and not (tmp_path / "hf").exists()


W1 = "layers.1.feed_forward.w1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(W1), "tensor model.layers.1.mlp.gate_proj.weight is missing"),
        (lambda t: t.update({"layers.1.bias": torch.zeros(4)}), "tensor layers.1.bias does not belong to a Llama"),
        (lambda t: t.update({"layers.2.ffn_norm.weight": torch.zeros(4)}), "has 3 layers, its parameters say 2"),
        (
            lambda t: t.update({W1: t[W1][:96]}),
            r"gate_proj.weight has shape \[96, 64\], its parameters ask for \[192, 64\]",
        ),
        (lambda t: t.update({W1: t[W1].int()}), f"tensor {W1} is of dtype torch.int32"),
        (lambda t: t.update({"norm.weight": 1.0}), "consolidated.00.pth: is not a table of tensors"),
    ],
)
def test_wrong_tensors_are_refused_by_name(tmp_path, change, message):
    source, tensors = write_meta(tmp_path / "meta", meta_tensors()), meta_tensors()
    change(tensors)
    torch.save(tensors, source / "consolidated.00.pth")
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_parts_that_do_not_fit_are_refused(tmp_path):
    source, target = write_meta(tmp_path / "meta", meta_tensors(), n=2), tmp_path / "hf"
    second = source / "consolidated.01.pth"
    part = torch.load(second)
    torch.save({**part, W1: part[W1][:, :32]}, second)
    with pytest.raises(UserError, match=f"tensor {W1}: its parts in the files do not fit together"):
        convert(source, target)
    torch.save({**part, "norm.weight": part["norm.weight"] + 1}, second)
    with pytest.raises(UserError, match="tensor norm.weight differs between the files"):
        convert(source, target)
    torch.save({**part, W1: part[W1].half()}, second)
    with pytest.raises(UserError, match=f"tensor {W1} is of dtype torch.float32, not of one"):
        convert(source, target)
    part.pop(W1)
    torch.save(part, second)
    with pytest.raises(UserError, match=f"tensor {W1} is not in both consolidated.00.pth and consolidated.01.pth"):
        convert(source, target)
    second.rename(source / "consolidated.02.pth")
    with pytest.raises(UserError, match="without a gap; found consolidated.00.pth, consolidated.02.pth"):
        convert(source, target)
    (source / "consolidated.02.pth").unlink()
    with pytest.raises(UserError, match="has shape .*, its parameters ask for"):
        convert(source, target)
    assert not target.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*params.json: No such file"),
        ("{", "params.json: is not the params.json of a Llama"),
        ("[]", "params.json: is not the params.json of a Llama"),
        ("{}", "params.json: is not the params.json of a Llama .KeyError"),
        (json.dumps({**PARAMS, "n_heads": 0}), "params.json: is not the params.json of a Llama .ZeroDivision"),
        (json.dumps({**PARAMS, "n_layers": 10**9}), "has 2 layers, its parameters say 1000000000"),
        (
            json.dumps({**PARAMS, "multiple_of": 256}),
            r"gate_proj.weight has shape \[192, 64\], its .* ask for \[256, 64\]",
        ),
    ],
)
def test_wrong_parameters_are_refused(tmp_path, content, message):
    source = write_meta(tmp_path / "meta", meta_tensors())
    (source / "params.json").unlink()
    if content is not None:
        (source / "params.json").write_text(content)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "hf")


@pytest.mark.parametrize("keep", [0, 100, 5000, -100])
def test_truncated_files_are_refused(tmp_path, keep):
    pth = write_meta(tmp_path / "meta", meta_tensors()) / "consolidated.00.pth"
    pth.write_bytes(pth.read_bytes()[:keep])
    with pytest.raises(UserError, match="consolidated.00.pth: cannot be read, truncated or damaged"):
        convert(pth.parent, tmp_path / "hf")
    for version in (0, 1):
        file = write_llama2c(tmp_path / "model.bin", meta_tensors(), version)
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(
            UserError, match="model.bin: (cannot be read|has .* bytes, its header asks for|is no llama2.c)"
        ):
            convert(file, tmp_path / "hf")


def test_other_files_are_refused(tmp_path, shared_data):
    with pytest.raises(UserError, match="nowhere does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "hf")
    with pytest.raises(UserError, match="found none"):
        convert(tmp_path, tmp_path / "hf")
    with pytest.raises(UserError, match="botchan.txt: .*no llama2.c file"):
        convert(shared_data("spm/botchan.txt"), tmp_path / "hf")
    quantised = write_llama2c(tmp_path / "model.bin", meta_tensors(), version=2)
    with pytest.raises(UserError, match="of version 2, quantised; export it as version 1"):
        convert(quantised, tmp_path / "hf")


def test_the_script_converts_and_refuses(tmp_path, monkeypatch, capsys):
    source = write_llama2c(tmp_path / "model.bin", meta_tensors(), version=1)
    script = Path(__file__).parents[1] / "scripts/convert.py"

    def run(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        return ended.value.code

    assert run(source, tmp_path / "hf", "--dtype", "bfloat16") == 0
    assert read_config(tmp_path / "hf").num_hidden_layers == N_LAYERS
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"
    capsys.readouterr()
    assert run(tmp_path / "absent", tmp_path / "x") == 2
    assert capsys.readouterr().err == f"error: convert: {tmp_path / 'absent'} does not exist\n"
