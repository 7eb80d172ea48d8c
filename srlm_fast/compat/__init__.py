"""TRL's trainers by their names: a script changes its import and keeps the rest.

    from srlm_fast.compat import DPOConfig, DPOTrainer      # was: from trl import DPOConfig, DPOTrainer

    model = AutoModelForCausalLM.from_pretrained("llama")
    tokenizer = AutoTokenizer.from_pretrained("llama")
    trainer = DPOTrainer(model, args=DPOConfig("out", beta=0.1), train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model("out")

Arguments and data sets are those of TRL 1.16. What this trainer does not do is refused by name, with what to do
instead; docs/trainer.md lists where results differ.

| module | what is there |
| --- | --- |
| `arguments` | the configurations, and which arguments are taken, passed over or refused |
| `models` | models, adapters and tokenizers of Hugging Face as ours |
| `rows` | rows of data sets as items |
| `callbacks` | what callbacks see |
| `trainers` | the trainers |
"""

from srlm_fast.compat.arguments import CPOConfig, DPOConfig, KTOConfig, ORPOConfig, SFTConfig
from srlm_fast.compat.trainers import CPOTrainer, DPOTrainer, KTOTrainer, ORPOTrainer, SFTTrainer

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "SFTConfig",
    "SFTTrainer",
]
