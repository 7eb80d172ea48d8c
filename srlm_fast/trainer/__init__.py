"""The trainer: SFT and preference losses over packed items, on one process or sharded over many.

    config = DpoConfig(loss="ipo")
    trainer = Trainer(model, items, config, reference=reference_cache(model, config, items))
    trainer.fit()

Nothing here knows of iterations, judges or engines; any list of `Item` can be trained on.

| module | what is there |
| --- | --- |
| `fit` | `Trainer`: the loop over steps |
| `examples` | items with what a loss reads beside them; their division among ranks |
| `batch` | forward and backward over a batch, and its metrics |
| `evaluation` | held-out items during training, early stopping |
| `optimization` | the objective of a configuration, learning rates, AdamW |
| `eight_bit` | AdamW with moments in 8 bits |
| `offload` | moments in host memory while something else needs the GPU |
| `references` | reference log-probabilities in memory |
| `checkpoints` | training checkpoints: when they are whole, kept, resumed, refused |
| `storage` | their files, by torch.distributed.checkpoint |
| `machine` | FLOPs, their share of the peak, memory |
"""

from srlm_fast.trainer.evaluation import AgainstPrevious, Evaluation, below, worse_than_before
from srlm_fast.trainer.fit import Trainer
from srlm_fast.trainer.offload import offload_state, offloaded, reload_state
from srlm_fast.trainer.optimization import check_moments, learning_rate, make_optimizer, training_objective
from srlm_fast.trainer.references import reference_cache

__all__ = [
    "AgainstPrevious",
    "Evaluation",
    "Trainer",
    "below",
    "check_moments",
    "learning_rate",
    "make_optimizer",
    "offload_state",
    "offloaded",
    "reference_cache",
    "reload_state",
    "training_objective",
    "worse_than_before",
]
