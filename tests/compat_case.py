"""compat.DPOTrainer under torchrun, with TRL's own configuration, which starts torch.distributed: trains a model of
transformers and saves what each rank has then.

torchrun --nproc-per-node 2 tests/compat_case.py OUT TOKENIZER
"""

import sys
from pathlib import Path

import torch
import transformers
import trl
from test_compat import PAIRS, hf_model

from srlm_fast.compat import DPOTrainer


def train(out: Path, tokenizer_folder: Path, per_device: int) -> DPOTrainer:
    """Four steps of all pairs but one."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    args = trl.DPOConfig(
        str(out / "run"),
        use_cpu=True,
        learning_rate=3e-3,
        max_steps=4,
        per_device_train_batch_size=per_device,
        adam_epsilon=1e-3,
        logging_steps=1,
        save_steps=2,
    )
    trainer = DPOTrainer(hf_model(), args=args, train_dataset=PAIRS[:4], eval_dataset=PAIRS, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(out / "saved"))
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    trainer = train(folder, Path(sys.argv[2]), 2)
    found = {"model": trainer._given.state_dict(), "history": trainer.state.log_history, "eval": trainer.evaluate()}
    torch.save(found, folder / f"rank-{trainer.world.rank}.pt")
    trainer.world.exit(0)
