"""Tiny stand-ins for the models and the tasks of the paper's tables."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import transformers
import yaml
from conftest import VOCABULARY, llama_config, perturb, save_tokenizer, write_yaml

from benchmarks.quality.families import Score

QUESTIONS = 16  # of each task, more than there are solved examples


def save_models(folder: Path, names: Iterable[str]) -> None:
    """Write a fine-tune of one tiny Llama for each name of the hub, at either of its places."""
    for number, name in enumerate(sorted(names)):
        path = folder / (name if number % 2 else name.rpartition("/")[2])
        # The two LLaMA-2 MAmmoTHs have one token more than their bases.
        save_model(path, tokens=VOCABULARY + ("MAmmoTH-" in name))


def save_model(path: Path, tokens: int) -> None:
    torch.manual_seed(0)
    config = llama_config(max_position_embeddings=256)
    model = transformers.AutoModelForCausalLM.from_config(config)
    perturb(model, 0.05, seed=crc32(path.name.encode()))
    model.resize_token_embeddings(tokens, mean_resizing=False)
    model.save_pretrained(path)
    words = [f"w{number}" for number in range(tokens)]
    save_tokenizer(path, *words, bos_token="w1", eos_token="w2")


def save_tasks(folder: Path) -> None:
    """Write tasks by the names of lm-eval's, with the metrics that the paper's tables read."""
    questions = [
        {"q": f"w{3 + n} w{4 + n}", "c": [f"w{20 + n}", f"w{40 + n}"]} for n in range(QUESTIONS)
    ]
    save_choice_tasks(folder, questions)
    # The last digit of one word counts, if below 5: a model that knows nothing is right at times.
    last_digit = {"metric": "exact_match", "regexes_to_ignore": ["w[0-9]?(?=[0-9])", "[5-9]"]}
    written = {
        **asked(folder / "written.jsonl", questions),
        "output_type": "generate_until",
        "doc_to_target": "{{c[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 1, "do_sample": False},
        "metric_list": [{**last_digit, "aggregation": "mean", "higher_is_better": True}],
    }
    last = {"name": "flexible-extract", "filter": [{"function": "take_first"}]}
    write_yaml(folder / "gsm8k.yaml", {"task": "gsm8k", **written, "filter_list": [last]})
    write_yaml(folder / "minerva_math500.yaml", {"task": "minerva_math500", **written})
    save_code_tasks(folder, written)


def score(model: Path, examples: Iterable[tuple[str, str]]) -> Score:
    """Score a model on prompts and answers without lm-eval."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    losses, right = [], []
    for prompt, answer in examples:
        ids = tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        with torch.inference_mode():
            predicted = network(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        wanted = ids[0, start:]
        losses.append(-predicted.gather(1, wanted[:, None]).sum().item())
        right.append(bool((predicted.argmax(1) == wanted).all()))
    return Score(100 * sum(right) / len(right), sum(losses) / len(losses))


def asked(file: Path, questions: list[dict[str, Any]]) -> dict[str, Any]:
    """Write a task's data; return the part of its YAML that says so."""
    file.write_text("\n".join(map(json.dumps, questions)))
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "metadata": {"version": 1.0},
    }


def save_choice_tasks(folder: Path, questions: list[dict[str, Any]]) -> None:
    """AGIEval's parts list the right choices, or have an answer; others have a number."""
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{c}}",
        "metric_list": [accuracy],
    }
    count = len(questions)
    numbers = {"answer": [n % 2 for n in range(count)], "gold": [[n % 2] for n in range(count)]}
    tasks = {
        "answer": ["winogrande", "medqa_4options", "agieval_math"],
        "gold": ["agieval_sat_en", "agieval_jec_qa_kd", "agieval_jec_qa_ca"],
    }
    for key, names in tasks.items():
        documents = [{**q, key: a} for q, a in zip(questions, numbers[key], strict=True)]
        common = {
            **asked(folder / f"{key}.jsonl", documents),
            **choice,
            "doc_to_target": f"{{{{{key}}}}}",
        }
        for name in names:
            write_yaml(folder / f"{name}.yaml", {"task": name, **common})
    parts = {"group": "agieval", "task": ["agieval_sat_en", "agieval_math"]}
    mean = {"metric": "acc", "aggregation": "mean"}
    write_yaml(folder / "agieval.yaml", {**parts, "aggregate_metric_list": [mean]})


def save_code_tasks(folder: Path, written: dict[str, Any]) -> None:
    """MBPP and HumanEval: like lm-eval's, they do not load where no code may run."""
    (folder / "utils.py").write_text(
        "import os\n"
        'if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":\n'
        '    raise ValueError("code may not be run")\n'
        "def pass_at_1(references, predictions):\n"
        "    return 0.5\n"
        "def pass_at_k(references, predictions, k):\n"
        '    return {"pass@1": 0.25}\n'
    )
    unsafe = {**written, "unsafe_code": True}
    created = {"name": "create_test", "filter": [{"function": "take_first"}]}
    tasks = {
        "mbpp": {**unsafe, "metric_list": [{"metric": "FUNCTION.pass_at_1"}]},
        "humaneval": {
            **unsafe,
            "metric_list": [{"metric": "FUNCTION.pass_at_k", "k": [1]}],
            "filter_list": [created],
        },
    }
    for name, task in tasks.items():
        task["metric_list"][0] |= {"aggregation": "mean", "higher_is_better": True}
        text = yaml.safe_dump({"task": name, **task})
        (folder / f"{name}.yaml").write_text(text.replace("FUNCTION", "!function utils"))
