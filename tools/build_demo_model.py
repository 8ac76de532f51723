"""Pretrain the demo's base model: a small Llama on the sources and documentation of Python's standard library.

    python tools/build_demo_model.py --minutes 100
    python tools/build_demo_model.py --minutes 60 --go-on --lr 2e-3    # continue from the existing checkpoint

Writes a Hugging Face checkpoint (config, bf16 safetensors, tokenizer) to `fastlora/demo/model/`.
The corpus leaves out the modules that `fastlora.demo.stdlib_data` holds out, so the demo is evaluated on text
that the base model has not seen. It takes about 100 minutes on two CPU cores with AVX512-BF16.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastlora.demo import stdlib_data

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
CONTEXT = 512
OUT = Path(__file__).resolve().parent.parent / "fastlora" / "demo" / "model"


def corpus() -> list[str]:
    """The documents to learn from: the library's sources, and the language reference that comes with pydoc."""
    return stdlib_data.plain_sources(held_out=False) + [str(text) for text in topics.values()]


def build_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with `VOCAB_SIZE` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=None,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> LlamaForCausalLM:
    """A Llama of 3.9 M parameters; K of every linear layer is a multiple of NF4's block of 64."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """[tokens] int64: all documents end to end, each followed by the end-of-text token."""
    encodings = tokenizer(documents, add_special_tokens=False)["input_ids"]
    flat = [token for ids in encodings for token in [*ids, tokenizer.eos_token_id]]
    return torch.tensor(flat)


def windows(stream: torch.Tensor, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """[batch, length]: random windows of the stream."""
    starts = torch.randint(0, len(stream) - length, (batch,), generator=generator)
    return torch.stack([stream[start : start + length] for start in starts.tolist()])


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, length: int) -> float:
    """Mean cross-entropy (nats per token) on 64 fixed windows of source the model never saw."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(4):
        ids = windows(stream, 16, length, generator)
        with torch.autocast("cpu", torch.bfloat16):
            total += model(input_ids=ids, labels=ids).loss.item()
    model.train()
    return total / 4


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict[str, float]) -> None:
    """Write the checkpoint in bf16, and what was measured in `training.json`."""
    copy.deepcopy(model).bfloat16().save_pretrained(OUT)
    tokenizer.save_pretrained(OUT)
    (OUT / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=100, help="length of the run; the schedule goes by the clock")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--go-on", action="store_true", help="continue from the existing weights, with a new optimizer")
    args = parser.parse_args()

    torch.manual_seed(0)
    documents = corpus()
    tokens_before, minutes_before = 0, 0.0
    if args.go_on:
        tokenizer, model = PreTrainedTokenizerFast.from_pretrained(OUT), LlamaForCausalLM.from_pretrained(OUT).float()
        facts = json.loads((OUT / "training.json").read_text())
        tokens_before, minutes_before = facts["tokens_seen"], facts["minutes"]
    else:
        tokenizer, model = build_tokenizer(documents), build_model()
    stream = token_stream(tokenizer, documents)
    unseen = token_stream(tokenizer, stdlib_data.plain_sources(held_out=True))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(stream) / 1e6:.2f} M tokens", flush=True)

    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(1 + tokens_before)  # not the windows of the earlier run
    start, step, running = time.monotonic(), 0, math.log(VOCAB_SIZE)

    def checkpoint() -> None:
        facts = {
            "parameters": parameters,
            "tokens_seen": tokens_before + step * args.batch * args.length,
            "minutes": round(minutes_before + (time.monotonic() - start) / 60, 1),
            "train_loss": round(running, 4),
            "held_out_loss": round(held_out_loss(model, unseen, args.length), 4),
        }
        print(step, facts, flush=True)
        save(model, tokenizer, facts)

    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        rate = args.lr * min(1.0, (step + 1) / 200) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = windows(stream, args.batch, args.length, generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        running += 0.02 * (loss.item() - running)
        if step % 250 == 0:
            checkpoint()
    checkpoint()


if __name__ == "__main__":
    main()
