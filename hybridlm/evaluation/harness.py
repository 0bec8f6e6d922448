"""hybridlm's models in lm-evaluation-harness under the name `hybridlm`, and its tasks as tasks of ours.

`python -m hybridlm.evaluation.harness run --model hybridlm --model_args run=runs/a --tasks NAME` is the harness's own
command, which knows the name.
"""

import importlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hybridlm import config_io
from hybridlm.config_check import ConfigError
from hybridlm.evaluation import windows
from hybridlm.evaluation.document_scores import DocumentScores, score_windows
from hybridlm.evaluation.loglikelihood import log_likelihoods, request
from hybridlm.evaluation.options import Options
from hybridlm.evaluation.scoring import Scorer, open_run
from hybridlm.evaluation.task import Task, numbers
from hybridlm.evaluation.texts import Text
from hybridlm.generate import Sampler, Sampling, beginning

MAX_NEW_TOKENS = 256
"""Where a task names no `max_gen_toks`; the harness's own models have the same."""

# Its bootstraps fork a pool of processes, and children of a process with JAX's threads hang, so that it never ends.
os.environ["DISABLE_MULTIPROC"] = "1"


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "--task harness", f": needs the package {error.name}; install it with pip install 'hybridlm[eval]'"
        ) from error


LM: Any = _import("lm_eval.api.model").LM
register_model: Any = _import("lm_eval.api.registry").register_model


@register_model("hybridlm")
class HybridLM(LM):
    """A run's latest checkpoint. A context is the beginning of a document and is never cut."""

    def __init__(self, scorer: Scorer):
        super().__init__()
        self.scorer = scorer

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "HybridLM":
        """Of `run=DIR`, and fields of its config as `a.b=value`."""
        return cls.create_from_arg_obj(dict(word.split("=", 1) for word in arg_string.split(",")), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "HybridLM":
        """Of `run`, and fields of its config."""
        fields = {name: value for name, value in arg_dict.items() if name != "run"}
        if "run" not in arg_dict:
            raise ConfigError("--model_args", ": needs run=DIR, a run directory")
        run_config = config_io.load_run_config(arg_dict["run"])
        config = config_io.override(run_config, [f"{name}={value}" for name, value in fields.items()])
        return cls(open_run(config, Path(arg_dict["run"]), run_config.data.seq_len))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        asked = [request(self.scorer.tokenizer, *instance.args) for instance in requests]
        return [(found.log_likelihood, found.greedy) for found in log_likelihoods(self.scorer, asked)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of the tokens of each text, without its end, in `windows.rolling` of `data.seq_len` tokens."""
        texts = [text_of(self.scorer, number, instance.args[0]) for number, instance in enumerate(requests)]
        lengths = [text.num_targets for text in texts]
        scores = [DocumentScores.empty(length) for length in lengths]
        score_windows(self.scorer, texts, list(windows.rolling(lengths, self.scorer.context)), scores)
        return [-float(np.sum(score.nats, dtype=np.float64)) for score in scores]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return [text for batch in batches(requests, self.scorer.num_rows) for text in generated(self.scorer, batch)]


def text_of(scorer: Scorer, number: int, text: str) -> Text:
    tokens = beginning(scorer.tokenizer, text.encode())
    return Text(str(number), "", tokens, len(text.encode()), len(text.split()))


def batches(requests: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Side by side what is alike in length would be faster, and out of order: the order of the requests stays."""
    for first in range(0, len(requests), size):
        yield requests[first : first + size]


def generated(scorer: Scorer, requests: Sequence[Any]) -> list[str]:
    """What follows each context, until one of its `until` or `max_gen_toks` tokens; greedy but for `do_sample`."""
    tokenizer = scorer.tokenizer
    told = [instance.args[1] for instance in requests]
    until = [[ending] if isinstance(ending := one.get("until") or [], str) else list(ending) for one in told]
    limits = [int(one.get("max_gen_toks", MAX_NEW_TOKENS)) for one in told]
    temperatures = {float(one.get("temperature", 1.0)) if one.get("do_sample") else 0.0 for one in told}
    if len(temperatures) > 1:
        raise ConfigError("temperature", f"={sorted(temperatures)}: requests of one task must have the same")
    sampler = Sampler(scorer.bind, tokenizer.vocab_size, Sampling(temperature=temperatures.pop()))
    # Rows that are too many repeat the first.
    rows = [beginning(tokenizer, instance.args[0].encode()) for instance in requests]
    rows += [rows[0]] * (scorer.num_rows - len(rows))
    keys = np.stack([np.asarray(jax.random.key_data(jax.random.key(row))) for row in range(len(rows))])
    ids: list[list[int]] = [[] for _ in requests]
    texts: list[str | None] = [None] * len(requests)
    with jax.set_mesh(scorer.mesh):
        for tokens in sampler(scorer.params, rows, keys, max(limits)):
            for row, token in enumerate(np.asarray(tokens)[: len(requests)].tolist()):
                if texts[row] is not None:
                    continue
                if token != tokenizer.end_id:
                    ids[row].append(token)
                text = tokenizer.decode(ids[row])
                places = [at for ending in until[row] if (at := text.find(ending)) >= 0]
                if places or token == tokenizer.end_id or len(ids[row]) == limits[row]:
                    texts[row] = text[: min(places)] if places else text
            if None not in texts:
                break
    return [text for text in texts if text is not None]


def task_of_harness(name: str) -> Task:
    """Its task or group of that name, as one of ours."""
    return Task(
        summary=f"{name} of lm-evaluation-harness",
        run=partial(run_harness, name=name),
        lines=numbers,
        reads=frozenset({"include", "limit", "seed", "bootstrap"}),
    )


def run_harness(scorer: Scorer, options: Options, *, name: str) -> dict[str, Any]:
    """The harness's metrics as `metric,filter`, of groups as `task/metric,filter`.

    Raises ConfigError where it has no such task.
    """
    managers: Any = _import("lm_eval.tasks").TaskManager
    # Its own tasks are more than ten thousand files, which are left unread where a directory is named.
    manager = (
        managers() if options.include is None else managers(include_path=str(options.include), include_defaults=False)
    )
    if name not in manager.all_tasks:
        raise ConfigError(f"--task harness:{name}", ": there is no such task; --include DIR takes those of a directory")
    found = _import("lm_eval.evaluator").simple_evaluate(
        model=HybridLM(scorer),
        tasks=[name],
        limit=options.limit,
        task_manager=manager,
        bootstrap_iters=options.bootstrap or 0,
        log_samples=False,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
    )
    report = {}
    for task, metrics in found["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, int | float):
                report[metric if task == name else f"{task}/{metric}"] = value
    return report


def main() -> None:
    """The harness's own command line."""
    _import("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    main()
