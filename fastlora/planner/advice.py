"""Which method, rank, rate and batch to choose on a card, each choice with the measurements behind it.

The figures are those of `bench/cases/rates.csv` (35 models, test loss by learning rate and rank) and of
`bench/cases/methods.csv` (peft's comparison on Llama-3.2-3B, MetaMathQA). `tests/planner/test_advice.py` computes them
again.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

from fastlora.planner.estimate import Estimate, forecast

TASKS = {"simple": 16, "moderate": 32, "complex": 64}  # rank on all linears
RATE, FULL_RATE = 3e-4, 1e-5
REGRET_OF_RANK = {
    1: 0.0114,
    4: 0.0079,
    16: 0.0043,
    64: 0.0007,
}  # test loss over the best of all ranks, mean over models
REGRET_OF_RATE = {1e-4: 0.0119, 3e-4: 0.0020, 1e-3: 0.0171}  # over the best rate of the same model and rank
MEASURED = {  # method -> (accuracy, rise of loss on other text), peft's comparison
    "full": (0.472, 0.030),
    "lora": (0.478, 0.050),
    "lora, MLP": (0.494, 0.032),
    "rslora, r 64": (0.513, 0.111),
    "prefix": (0.416, 0.198),
    "prompt": (0.343, 0.145),
}
_CHARACTERS = 3.6  # of English text a token; an estimate
_TOKENS = 8192  # of a micro-batch: from here on larger ones are hardly faster


@dataclass(frozen=True)
class Plan:
    """A run that can be started. why: the choices, each with its evidence."""

    title: str
    estimate: Estimate
    learning_rate: float
    why: list[str]
    leave_when: str

    def recipe(self, data: str | None) -> str:
        """The recipe file of this plan, for `fastlora train`."""
        setup = self.estimate.forecast.setup
        name = self.estimate.card.name if self.estimate.card else "any card"
        lines = [
            f"# {self.title}: forecast {self.estimate.expected / 2**30:.2f} GiB on {name}",
            f"model_name_or_path: {json.dumps(self.estimate.model.name)}",
            f"train_file: {json.dumps(data or 'train.jsonl')}",
            f"method: {'lora' if setup.method == 'qlora' else setup.method}",
        ]
        if setup.method in ("lora", "qlora"):
            lines += [f"r: {setup.r}", f"lora_alpha: {2 * setup.r}", "target_modules: all-linear"]
        if setup.quantized:
            lines.append("quantize: nf4")
        checkpointing = {"none": "false", "full": "true", "offload": "min"}.get(
            setup.checkpointing, setup.checkpointing
        )
        lines += [
            f"max_length: {setup.length}",
            f"per_device_train_batch_size: {setup.batch}",
            f"gradient_accumulation_steps: {setup.micro_batches}",
            f"gradient_checkpointing: {checkpointing}",
            f"learning_rate: {self.learning_rate:g}",
            "lr_scheduler_type: constant_with_warmup",
            "warmup_ratio: 0.03",
            "output_dir: runs/recommended",
        ]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Data:
    """What a data file holds. tokens and longest are estimated from characters."""

    examples: int
    tokens: int
    longest: int


def recommend(
    model: str,
    *,
    gpu: str,
    gpus: int = 1,
    task: str = "moderate",
    tasks: int = 1,
    length: int | None = None,
    data: Data | None = None,
    params: str | None = None,
) -> tuple[list[Plan], list[str]]:
    """Plans that fit, the best first; and for each method that does not, what it would take.

    Args:
        task: simple, moderate or complex, which sets the rank.
        tasks: how many tasks are to be learned, one adapter each.
        length: tokens of a sample; None: by the data, or 2048.

    Raises:
        ValueError: an unknown model, card or task.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    if tasks < 1:
        raise ValueError(f"tasks must be at least 1, not {tasks}")
    longest = data.longest if data else 2048
    length = length or min(8192, max(256, -(-longest // 256) * 256))
    plans, missing = [], []
    for method in ("lora", "qlora", "full"):
        found, closest = _fitting(model, params, method, TASKS[task], length, gpu, gpus)
        if found is None:
            ways = "; ".join(f"{change} ({size / 2**30:.1f} GiB)" for change, size in closest.ways[:3])
            missing.append(
                f"{method}: at least {closest.low / 2**30:.1f} GiB; would fit: {ways or 'nothing that was tried'}"
            )
            continue
        plans.append(_plan(found, method, task, tasks))
    return plans, missing


def _fitting(
    model: str, params: str | None, method: str, r: int, length: int, gpu: str, gpus: int
) -> tuple[Estimate | None, Estimate]:
    """The quickest way to run a method that fits; and the one that needs least."""
    batch = max(1, min(8, _TOKENS // length))
    quick = [(batch, "none"), (batch, "selective"), (batch, "full"), (1, "full"), (1, "offload")]

    def estimate(rows: int, checkpointing: str, advise: bool = False) -> Estimate:
        return forecast(
            model, params=params, method=method, length=length, batch=rows, r=r, checkpointing=checkpointing, gpu=gpu,
            gpus=gpus, micro_batches=max(1, 16 // (rows * gpus)), sharding="fsdp" * (method == "full" and gpus > 1),
            advise=advise,
        )  # fmt: skip

    if estimate(*quick[-1]).verdict == "does not fit":
        return None, estimate(*quick[-1], advise=True)
    for rows, checkpointing in quick:
        found = estimate(rows, checkpointing)
        if found.fits:
            return found, found
    return None, estimate(*quick[-1], advise=True)


def _plan(found: Estimate, method: str, task: str, tasks: int) -> Plan:
    setup, rank = found.forecast.setup, TASKS[task]
    full = method == "full"
    rate = FULL_RATE if full else RATE
    accuracy, forgets = MEASURED["full" if full else "lora"]
    each = setup.trained * (2 if full else 4)
    why = [
        f"memory: {found.expected / 2**30:.1f} GiB ({found.low / 2**30:.1f} to {found.high / 2**30:.1f}); "
        f"{found.evidence}"
    ]
    if found.tokens_per_second:
        low, middle, high = found.tokens_per_second
        why.append(f"speed: {middle:,.0f} tokens/s predicted ({low:,.0f} to {high:,.0f})")
    if full:
        why.append(
            f"rate {rate:g}: with it full fine-tuning was {accuracy:.3f} accurate in peft's comparison, and its loss "
            f"on other text rose by {forgets:.3f}"
        )
    else:
        regret = min(REGRET_OF_RANK.items(), key=lambda item: abs(item[0] - rank))
        why += [
            f"rank {rank} on all linears: over 35 models rank {regret[0]} cost {regret[1]:.2%} of test loss; "
            f"1, 4, 16 and 64 cost {', '.join(f'{each:.2%}' for each in REGRET_OF_RANK.values())}",
            f"rate {rate:g}, constant: {REGRET_OF_RATE[3e-4]:.2%} from each model's best rate on average; "
            f"1e-4 costs {REGRET_OF_RATE[1e-4]:.2%}, 1e-3 {REGRET_OF_RATE[1e-3]:.2%}",
            f"quality: in peft's comparison LoRA was {accuracy:.3f} accurate, full fine-tuning "
            f"{MEASURED['full'][0]:.3f}, a prefix {MEASURED['prefix'][0]:.3f}, a prompt {MEASURED['prompt'][0]:.3f}",
            f"forgetting: loss on other text rose by {forgets:.3f} (full {MEASURED['full'][1]:.3f}, rsLoRA r 64 "
            f"{MEASURED['rslora, r 64'][1]:.3f}): the size of the steps drives it, not the number of parameters",
        ]
    if method == "qlora":
        why.append("NF4: the base in 16 bits is exact and quicker; choose it where it fits")
    if tasks > 1:
        why.append(
            f"{tasks} tasks: {tasks * each / 1e9:,.2f} GB on disk; "
            + ("a whole model each" if full else "adapters share one base")
        )
    leave = {
        "full": "leave it if the loss on other text rises: LoRA changes less",
        "lora": "leave it for full fine-tuning if a rank of 64 still learns more than 16 on held-out data",
        "qlora": "leave it for LoRA on a larger card, or if NF4 alone raises the held-out loss before training",
    }[method]
    return Plan(
        f"{method}, {setup.batch} x {setup.length} tokens, checkpointing {setup.checkpointing}", found, rate, why, leave
    )


def tutorial(found: list[Plan], task: str) -> str:
    """What tutorials advise, and where that holds here."""
    methods = [plan.estimate.forecast.setup.method for plan in found]
    first = "bf16 LoRA" if "lora" in methods else "QLoRA" if "qlora" in methods else "nothing"
    small = {"simple": 8, "moderate": 16, "complex": 32}[task]
    return (
        "a tutorial's rule (bf16 LoRA where it fits, else QLoRA; rank 8, 16 or 32 by task) says "
        f"{first} with rank {small}. "
        f"The first half holds; of the second, ranks from 16 on differ by less than {REGRET_OF_RANK[16]:.1%} in test "
        "loss, so memory, not quality, is the reason for a small one"
    )


def data_in(path: Path) -> Data:
    """The examples of a JSONL or text file, a line each, and their tokens, estimated from characters.

    Raises:
        ValueError: no such file, or nothing in it.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            sizes = [len(line) for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if not sizes:
        raise ValueError(f"{path}: it holds no example")
    return Data(
        len(sizes), round(sum(sizes) / _CHARACTERS), round(sorted(sizes)[int(0.99 * (len(sizes) - 1))] / _CHARACTERS)
    )
