"""Batches and models from which a start can be drawn (`init_lora_weights="eva"`)."""

import torch


def batches(count=4, rows=6, masked=True):
    """Batches of a language model; with masks, some positions and some labels do not count."""
    generator = torch.Generator().manual_seed(11)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 64, (rows, 20), generator=generator)
        batch = {"input_ids": ids}
        if masked:
            batch["attention_mask"] = (torch.arange(20) < torch.randint(12, 21, (rows, 1), generator=generator)).long()
            batch["labels"] = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
        found.append(batch)
    return found


def spread(model):
    """The same model with inputs whose spectrum falls off, as in trained models."""
    generator = torch.Generator().manual_seed(5)
    embedding = model.get_input_embeddings().weight
    width = embedding.shape[1]
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    embedding.data = (torch.randn(len(embedding), width, generator=generator) * 0.85 ** torch.arange(width)) @ basis
    return model
