"""Tiny causal models, and a batch with padding and targets."""

import torch

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


def tiny(family, **changes):
    """A model of two layers with grouped queries, in fp32."""
    import transformers

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "head_dim": 8,
    }
    config = transformers.AutoConfig.for_model(family, **sizes | changes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def batch(model, length=9):
    """Ids, a mask that hides the end of the second row, and labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
