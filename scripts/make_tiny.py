"""Makes configs/tiny: tokenizer, human data, held-out prompts, judge prompt, and the pretrained seed model M0.

    python scripts/make_tiny.py [--out configs/tiny] [--seed 0] [--threads 2]
    python scripts/make_tiny.py --data-only           the texts alone, in a second
    python scripts/make_tiny.py --last-stage FOLDER   from the weights of the first two stages, in two minutes

Pretraining takes about half an hour on two cores. Exit code 2: bad input (one line says what).
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from srlm_fast.checkpoint import load_model, save_weights
from srlm_fast.errors import UserError
from srlm_fast.tokenizer import load_tokenizer
from srlm_fast.world_corpus import write_data
from srlm_fast.world_pretrain import pretrain, train_tokenizer


def report(step: int, loss: float, _model: torch.nn.Module) -> None:
    if step % 100 == 0:
        print(f"step {step}: loss {loss:.3f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("configs/tiny"), help="model folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the pretraining")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--last-stage", type=Path, metavar="FOLDER", help="holds tokenizer and weights to go on from")
    parser.add_argument("--data-only", action="store_true", help="write the texts only, into an existing folder")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.data_only:
            return write_data(arguments.out, seed=arguments.seed)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = load_model(arguments.last_stage) if arguments.last_stage else None
            if arguments.last_stage:
                shutil.copy(arguments.last_stage / "tokenizer.model", folder)
            else:
                train_tokenizer(folder / "tokenizer.model", arguments.seed)
            write_data(folder, seed=arguments.seed)
            model = pretrain(load_tokenizer(folder), seed=arguments.seed, on_step=report, model=model)
            save_weights(model, arguments.out, dtype=torch.bfloat16, extra_files=sorted(folder.iterdir()))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
