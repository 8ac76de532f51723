"""Advice: plans that fit, and figures that the measurements give."""

import csv
import gzip
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest

from fastlora.planner import advice
from fastlora.training import recipe as recipes

CASES = Path(__file__).resolve().parents[2] / "bench" / "cases"


@pytest.fixture(scope="module")
def losses():
    """model -> (rate, rank) -> test loss."""
    found = defaultdict(dict)
    with (CASES / "rates.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found[row["model"]][float(row["lr"]), int(row["rank"])] = float(row["test_nll"])
    return found


def test_what_a_rank_costs_is_what_was_measured(losses):
    assert len(losses) == 35
    for rank, said in advice.REGRET_OF_RANK.items():
        costs = []
        for each in losses.values():
            if mine := [loss for (_, r), loss in each.items() if r == rank]:
                costs.append(min(mine) / min(each.values()) - 1)
        assert mean(costs) == pytest.approx(said, abs=5e-5)


def test_what_a_rate_costs_is_what_was_measured(losses):
    for rate, said in advice.REGRET_OF_RATE.items():
        costs = []
        for each in losses.values():
            for (lr, rank), loss in each.items():
                if lr == rate:
                    costs.append(loss / min(other for (_, r), other in each.items() if r == rank) - 1)
        assert mean(costs) == pytest.approx(said, abs=5e-5)


def test_accuracy_and_forgetting_are_those_of_pefts_comparison():
    with (CASES / "methods.csv").open(newline="") as file:
        rows = {row["experiment"].replace("llama-3.2-3B-", ""): row for row in csv.DictReader(file)}
    names = {
        "full": "full-finetuning/lr_0.00001",
        "lora": "lora/rank32",
        "lora, MLP": "lora/rank10-target-mlp",
        "rslora, r 64": "lora/rank64-rslora",
        "prefix": "prefixtuning/tokens50-init_prefix-lr_0.005",
        "prompt": "prompt_tuning/sample_vocab-lr_0.001",
    }
    for said, name in names.items():
        row = rows[name]
        found = float(row["test_accuracy"]), float(row["forgetting_wiki_loss_rise"])
        assert found == pytest.approx(advice.MEASURED[said], abs=6e-4), said


def test_lora_in_16_bits_comes_first_where_it_fits_and_nf4_where_it_does_not():
    large, _ = advice.recommend("llama-3-8b", gpu="a100-80gb")
    small, missing = advice.recommend("llama-3-8b", gpu="rtx-4090")
    assert [plan.estimate.forecast.setup.method for plan in large] == ["lora", "qlora"]
    assert [plan.estimate.forecast.setup.method for plan in small] == ["qlora"]
    assert [line.partition(":")[0] for line in missing] == ["lora", "full"]
    assert all(plan.estimate.fits for plan in [*large, *small])


def test_the_rank_goes_with_the_task_and_every_plan_says_why():
    for task, rank in advice.TASKS.items():
        plans, _ = advice.recommend("llama-3.2-1b", gpu="24gb", task=task)
        assert plans[0].estimate.forecast.setup.r == rank
        assert f"rank {rank}" in " ".join(plans[0].why)
        assert all(len(plan.why) >= 2 and plan.leave_when for plan in plans)
        assert "16 on differ by less" in advice.tutorial(plans, task)


def test_nothing_fits_is_said_with_what_would():
    plans, missing = advice.recommend("llama-3-70b", gpu="24gb")
    assert plans == []
    assert "devices with fsdp" in " ".join(missing)


def test_the_recipe_of_a_plan_is_one(tmp_path):
    plans, _ = advice.recommend("qwen3-0.6b", gpu="8gb", tasks=3)
    for number, plan in enumerate(plans):
        path = tmp_path / f"{number}.yaml"
        path.write_text(plan.recipe("mine.jsonl"))
        made = recipes.load(path)
        setup = plan.estimate.forecast.setup
        assert (made.max_length, made.per_device_train_batch_size) == (setup.length, setup.batch)
        assert made.train_file == "mine.jsonl"
        assert (made.quantize == "nf4") == bool(setup.quantized)


def test_data_set_the_length(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(("x" * 1440 + "\n") * 50)
    held = advice.data_in(path)
    assert (held.examples, held.longest) == (50, 400)
    plans, _ = advice.recommend("qwen3-0.6b", gpu="24gb", data=held)
    assert plans[0].estimate.forecast.setup.length == 512
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no example"):
        advice.data_in(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        advice.data_in(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("asked", "said"), [({"task": "hard"}, "task must be one of simple"), ({"tasks": 0}, "tasks must be at least 1")]
)
def test_what_is_asked_wrongly_is_refused_by_name(asked, said):
    with pytest.raises(ValueError, match=said):
        advice.recommend("llama-3-8b", gpu="24gb", **asked)
