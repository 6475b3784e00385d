"""Build the model card of a published model: metadata for the Hub, and a description of how the model was made.

The card is deterministic for a commit, its artifacts, conf/publish.yaml and the statement of tools.verify. It contains
no local paths, and no times except the day of a verification.
"""

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from stages.core.artifacts import read_json
from stages.core.compose import PARAMS
from stages.core.errors import printable
from stages.core.starts import NO_START
from stages.download.schema import mask_credentials
from stages.figures.names import SHORT_NAMES
from tools.chain import describe_chain, read_chain
from tools.lock_history import read_lock
from tools.verify.statement import PUBLISHED_NAME, is_passed, read_statement, summarize_statement

SPLITS = ("train", "validation", "test")
MAX_SHOWN_VALUES = 20  # values of a group; further ones are only counted
PATH_KEYS = ("path", "storage")  # keys of params.yaml and conf/ with paths as values
PIPELINE_TAGS = {"causal": "text-generation", "mlm": "fill-mask"}
OBJECTIVE_TITLES = {"causal": "Causal language modeling", "mlm": "Masked language modeling"}
METRIC_MEANINGS = {
    "bits_per_byte": "bits per UTF-8 byte of text, lower is better; each document separately, in windows of {context}"
    " tokens; comparable across models and lossless tokenizers on the same documents",
    "pseudo_bits_per_byte": "bits per UTF-8 byte of text, lower is better; each token predicted once from both sides,"
    " in windows of {context} tokens; comparable for one tokenizer only, and never with bits_per_byte",
    "loss": "nats per predicted token over blocks of {block_size} tokens; comparable for this size and tokenizer only",
    "perplexity": "exp(loss)",
    "masked_loss": "nats per masked token over blocks of {block_size} tokens, with the same masks in all evaluations;"
    " comparable for this size and tokenizer only",
    "masked_perplexity": "exp(masked_loss)",
    "documents": "documents evaluated",
    "tokens": "tokens of text in these documents",
    "bytes": "bytes of text in these documents",
}  # a summary of docs/metrics.md


class RecordedRun(NamedTuple):
    """The run that made the artifacts in the workspace, as recorded by git and dvc.lock."""

    task: str
    commit: str
    remote: str | None
    """URL of the git repository without credentials; None if it has no remote that others can reach."""
    stages: dict[str, Any]
    """Stage name to its section of dvc.lock, for the stages that made the model and its metrics, first to last."""
    is_text_in_git: bool
    """True if the text at data.path is in git."""
    has_dvc_remote: bool
    """True if the repository configures a default DVC remote."""

    @property
    def params(self) -> dict[str, Any]:
        """Values of params.yaml that the stages used: shared values and the section of this task."""
        values: dict[str, Any] = get_locked_params(self)[PARAMS.name]
        return values

    @property
    def model(self) -> dict[str, Any]:
        """Values of the model configuration that the stages used."""
        values: dict[str, Any] = get_locked_params(self)[f"conf/model/{self.params['tasks'][self.task]['model']}.yaml"]
        return values

    @property
    def start(self) -> str | None:
        """Task that this one started from; None if it did not start from another task."""
        start = self.params["tasks"][self.task]["start"]
        return None if start == NO_START else str(start)

    @property
    def objective(self) -> str:
        """Name of the objective: causal or mlm."""
        return str(get_locked_params(self)[f"conf/task/{self.task}.yaml"]["objective"]["name"])


def make_card(
    run: RecordedRun, repository: str | None, license: str | None, language: list[str] | None, memorization: str
) -> ModelCard:
    """Build the model card of a run.

    Args:
        repository: OWNER/NAME on the Hub; None: a placeholder.
        license: identifier of the model's license; None: the card says that there is none.
        language: language codes of the text; None: not stated.
        memorization: section on how much of its training text the model gives away.
    """
    data, config = read_json("data/raw/stats.json"), read_json(f"models/{run.task}/config.json")
    metrics = read_json(f"reports/evaluate/{run.task}/metrics.json")[run.task]
    name = (repository or f"OWNER/{run.params['tasks'][run.task]['model']}").partition("/")[2]
    metadata = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[run.objective],
        tags=[config["model_type"], "lm-repro"],
        base_model=find_base_model(run),
        datasets=[data["source"]["hub"]] if "hub" in data["source"] else None,
        model_name=name,
        eval_results=list(build_eval_results(run.objective, metrics, data["source"])),
    )
    sections = [
        f"# {name}\n\n{render_introduction(run, config, data['source'])}",
        f"## Use\n\n{render_usage(run, repository or f'OWNER/{name}')}",
        f"## Data\n\n{render_data_section(run, data)}",
        f"## Results\n\n{render_metrics_section(run, metrics)}",
        f"## Memorization\n\n{memorization}",
        f"## Samples\n\n{read_samples(run.task)}",
        f"## Parameters\n\n{render_parameters(run)}",
        f"## Where it comes from\n\n{render_lineage(run)}",
        f"## Make it again\n\n{render_reproduction(run, data['source'])}",
        f"## License\n\n{render_license_section(license)}",
    ]
    return ModelCard(
        f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(section.strip() for section in sections) + "\n"
    )


def find_base_model(run: RecordedRun) -> str | None:
    """Return the Hub repository of the checkpoint that training started from; None if it is not from the Hub."""
    model = run.model
    return model["path"] if run.start is None and not model["from_scratch"] and model["revision"] else None


def build_eval_results(objective: str, metrics: dict[str, Any], source: dict[str, Any]) -> list[EvalResult]:
    """Return one result per metric of the trained model and split. Baseline metrics and counts are only in the text."""
    return [
        EvalResult(
            task_type=PIPELINE_TAGS[objective],
            task_name=OBJECTIVE_TITLES[objective],
            dataset_type=source.get("hub", "text"),
            dataset_name=source["hub"] if "hub" in source else source["files"],
            dataset_revision=source.get("commit"),
            dataset_split=split,
            metric_type=key,
            metric_name=f"{key} ({split})",
            metric_value=value,
        )
        for split in ("test", "validation")
        for key, value in metrics[split].items()
        if key in METRIC_MEANINGS and isinstance(value, float)
    ]


def render_introduction(run: RecordedRun, config: dict[str, Any], source: dict[str, Any]) -> str:
    """Return one paragraph on the model, the weights it started from and its training data."""
    start = f"fine-tuned from `{base}`" if (base := find_base_model(run)) else "trained from scratch"
    if len(links := read_chain(read_lock(), run.task)) > 1:
        start = f"trained further from {format_code_span(links[1].task)}, a model of this repository"
    elif not base and not run.model["from_scratch"]:
        start = "fine-tuned from a local checkpoint, pinned by the hashes under Parameters"
    num_millions = sum(math.prod(shape) for shape in read_tensor_shapes(Path(f"models/{run.task}"))) / 1e6
    return (
        f"{OBJECTIVE_TITLES[run.objective]}: `{config['architectures'][0]}` with {num_millions:.1f} M parameters,"
        f" {start} on {describe_source(source)}, by lm-repro, a pipeline in which every number can be traced to its"
        " inputs. This card was generated from the pipeline's records."
    )


def read_tensor_shapes(directory: Path) -> list[list[int]]:
    """Return the shapes of all tensors in the safetensors files of a directory."""
    found = []
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:  # reads only the header
            found += [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    return found


def describe_source(source: dict[str, Any]) -> str:
    if "hub" in source:
        return f"[{source['hub']}](https://huggingface.co/datasets/{source['hub']}) at commit `{source['commit']}`"
    return f"`{printable(source['files'])}`"


def render_usage(run: RecordedRun, repository: str) -> str:
    """Return Python code that loads the model from the Hub and runs it on the first sample prompt."""
    prompt = get_locked_params(run)[f"conf/task/{run.task}.yaml"]["samples"]["prompts"][:1] or ["Once {mask} a time"]
    # Both are Python literals; repr escapes characters that are not printable.
    text = json.dumps(prompt[0], ensure_ascii=False) if prompt[0].isprintable() else repr(prompt[0])
    task = PIPELINE_TAGS[run.objective]
    load = f'from transformers import pipeline\n\nmodel = pipeline("{task}", model="{repository}")\n'
    tokens = Path(f"data/tokens/{run.task}/stats.json")
    if run.objective == "causal" and tokens.is_file() and "chat_template" in read_json(tokens):
        return (
            f"```python\n{load}"
            f'messages = [{{"role": "user", "content": {text}}}]\n'
            'print(model(messages, max_new_tokens=60)[0]["generated_text"][-1]["content"])\n```'
        )
    if run.objective == "causal":
        return (
            f"```python\n{load}"
            f"start = model.tokenizer.eos_token  # before the prompt, as in the metrics and samples below\n"
            f"prompt = {text}\n"
            'print(prompt + model(start + prompt, max_new_tokens=60, return_full_text=False)[0]["generated_text"])\n```'
        )
    return f'```python\n{load}print(model({text}.replace("{{mask}}", model.tokenizer.mask_token)))\n```'


def render_data_section(run: RecordedRun, data: dict[str, Any]) -> str:
    """Return the source of the text, the counts of dropped records and a table of the splits."""
    name, chosen = run.params["data"]["name"], run.params["tasks"][run.task]["sources"]
    sample = ": lm-repro's embedded sample of science questions and answers, CC0" if name == "sample" else ""
    revision = f" (revision `{data['source']['revision']}`)" if "hub" in data["source"] else ""
    rows, counted = [], []
    for split in SPLITS:
        tokens = read_json(f"data/tokens/{run.task}/{split}/stats.json")
        counts = [data["records_out"][split], tokens["documents"], tokens["text_tokens"], tokens["bytes"]]
        rows.append(f"| {split} | " + " | ".join(f"{count:,}" for count in counts) + " |")
        if "counted_bytes" in tokens:
            counted.append(f"{tokens['counted_bytes']:,} bytes of {split}")
    dropped = [f"{name.replace('_', ' ')}: {count:,}" for name, count in data["records_skipped"].items() if count]
    duplicates = data["held_out_with_near_duplicate_in_train"]
    looked_for = duplicates is not None and duplicates.get("looked_for")
    near = f"{duplicates['validation']} in validation, {duplicates['test']} in test" if looked_for else "not looked for"
    return "\n".join(
        [
            f"{describe_source(data['source'])}{revision}{sample}.",
            f"{data['records_in']:,} records were read (dropped: {', '.join(dropped) or 'none'}), and"
            f" {data['answers_out']:,} of their {data['answers_in']:,} answers are used. Held-out documents with a near"
            f" duplicate in train: {near}.",
            *([f"This task uses the sources {', '.join(map(format_code_span, chosen))}."] if chosen else []),
            *([f"Only completions are trained on: {', '.join(counted)}. The rest is context."] if counted else []),
            "",
            "| split | records | documents | tokens | bytes |\n|---|---|---|---|---|",
            *rows,
        ]
    )


def render_metrics_section(run: RecordedRun, metrics: dict[str, Any]) -> str:
    """Return tables of all metrics, of metrics by group and of scores on minimal pairs."""
    context = get_locked_params(run)[f"conf/task/{run.task}.yaml"]["evaluate"]["context"]
    rows = ["| metric | test | validation | |\n|---|---|---|---|"]
    for key in metrics["test"]:
        if key == "groups":
            continue
        values = " | ".join(format_figure(metrics[split][key]) for split in SPLITS[:0:-1])
        rows.append(
            f"| {key} | {values} | {describe_metric(key, context=context, block_size=run.params['block_size'])} |"
        )
    return "\n".join(
        [
            *rows,
            "",
            "The validation split is for choosing between experiments, the test split for reporting. All metrics are"
            " computed in fp32.",
            *render_group_tables(metrics),
            *render_score_section(run),
        ]
    )


def render_score_section(run: RecordedRun) -> Iterator[str]:
    """Yield a table of the accuracy on minimal pairs and questions, if the model was scored on any."""
    if f"score@{run.task}" not in run.stages:
        return
    figures = read_json(f"reports/score/{run.task}/metrics.json")[run.task]
    yield f"\nAccuracy on minimal pairs and multiple-choice questions, by {figures['method'].replace('_', '-')}\n"
    yield "| items | correct | 95 % interval | of |\n|---|---|---|---|"
    rows = {"all": figures}
    for group, values in figures["groups"].items():
        rows |= {f"{group}: {value}": found for value, found in values.items()}
    for name, found in list(rows.items())[:MAX_SHOWN_VALUES]:
        shares = found["accuracy"]["sum"]
        interval = f"{shares['low']:.1%} to {shares['high']:.1%}"
        yield f"| {format_code_span(name)} | {shares['share']:.1%} | {interval} | {found['items']:,} |"


def render_group_tables(metrics: dict[str, Any]) -> Iterator[str]:
    """Yield one table per group with more than one value in test, and one of the texts that are only evaluated."""
    for group, values in metrics["test"].get("groups", {}).items():
        if len(values) > 1:
            validation = metrics["validation"].get("groups", {}).get(group, {})
            yield render_group_table(f"By {format_code_span(group)}", {", test": values, ", validation": validation})
    if texts := metrics.get("texts"):
        yield render_group_table("Texts that are only evaluated", {"": texts})


def render_group_table(title: str, columns: dict[str, dict[str, Any]]) -> str:
    """Return a table with the headline metric of the first MAX_SHOWN_VALUES values, after and before training.

    Args:
        columns: suffix of a column's heading to the figures of each value, the value with the most text first.
    """
    values = next(iter(columns.values()))
    metric = next(name for figures in values.values() for name in figures if name in SHORT_NAMES)
    head = [title, "documents", "bytes", *(f"{metric}{column} (before training)" for column in columns)]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for value, figures in list(values.items())[:MAX_SHOWN_VALUES]:
        cells = [format_code_span(value), format_figure(figures["documents"]), format_figure(figures["bytes"])]
        cells += [format_trained_and_base(column.get(value, {}), metric) for column in columns.values()]
        rows.append("| " + " | ".join(cells) + " |")
    if (num_hidden := len(values) - MAX_SHOWN_VALUES) > 0:
        rows.append(f"\n{num_hidden:,} more values are in `reports/evaluate`.")
    return "\n" + "\n".join(rows)


def format_trained_and_base(figures: dict[str, Any], metric: str) -> str:
    """Format a metric as `TRAINED (BEFORE TRAINING)`; the empty string if it is missing."""
    return f"{format_figure(figures[metric])} ({format_figure(figures[f'base_{metric}'])})" if metric in figures else ""


def format_figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def format_code_span(text: str) -> str:
    """Format untrusted text as code in a cell of a Markdown table."""
    shown = printable(text).replace("|", "\\|")
    fence = "`" * (max((len(backticks) for backticks in re.findall("`+", shown)), default=0) + 1)
    pad = " " if len(fence) > 1 or not shown.strip() else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def describe_metric(key: str, **values: int) -> str:
    """Describe a metric: its meaning, its unit and when two values are comparable."""
    if key.startswith("base_"):
        return f"{key.removeprefix('base_')} of the model before training"
    if key.endswith("_se"):
        return f"standard error of {key.removesuffix('_se')} over documents"
    return METRIC_MEANINGS[key].format(**values)


def read_samples(task: str) -> str:
    """Return the page of samples that evaluate wrote, without its title."""
    return Path(f"reports/samples/{task}.md").read_text(encoding="utf-8").partition("\n")[2].strip()


def render_parameters(run: RecordedRun) -> str:
    """Return all values that dvc.lock tracks for the stages of the run, by file, as YAML."""
    return "\n\n".join(
        f"`{file}`\n\n```yaml\n{yaml.safe_dump(redact_values(values), sort_keys=False, allow_unicode=True)}```"
        for file, values in get_locked_params(run).items()
    )


def get_locked_params(run: RecordedRun) -> dict[str, Any]:
    """Return the values of params.yaml and conf/ that dvc.lock records for the stages: file to nested keys."""
    found: dict[str, Any] = {PARAMS.name: {}}
    for stage in run.stages.values():
        for file, values in stage.get("params", {}).items():
            keys = found.setdefault(file, {})
            for key, value in values.items():
                set_dotted_value(keys, key, value)
    return found


def set_dotted_value(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the value of a dotted key in nested `values`. A section as the value is merged into an existing section."""
    section, _, rest = dotted.partition(".")
    if rest:
        set_dotted_value(values.setdefault(section, {}), rest, value)
    elif isinstance(value, dict):
        values[section] = {**(values.get(section) or {}), **copy.deepcopy(value)}
    else:
        values[section] = value


def redact_values(value: Any) -> Any:
    """Remove credentials from URLs, and all but the last part from local paths outside the repository.

    Such paths can contain the names of people and machines.
    """
    if isinstance(value, dict):
        return {
            key: redact_path(item) if key in PATH_KEYS and isinstance(item, str) else redact_values(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [redact_values(item) for item in value]
    return mask_credentials(value) or value if isinstance(value, str) else value


def redact_path(path: str) -> str:
    """Reduce a path outside the repository to its last part, and remove credentials from a URL."""
    local = PurePath(path).is_absolute() or path.startswith(("~", ".."))
    return f".../{PurePath(path).name}" if local else mask_credentials(path) or path


def render_lineage(run: RecordedRun) -> str:
    """Return the chain of models, the git commit, and the md5 sums of outputs, code and inputs."""
    outs = {out["path"]: out["md5"] for stage in run.stages.values() for out in stage["outs"]}
    deps = {
        dep["path"]: dep.get("md5", dep.get("etag", dep.get("checksum", "?")))
        for stage in run.stages.values()
        for dep in stage["deps"]
        if dep["path"] not in outs
    }
    code = {path: deps.pop(path) for path in sorted(deps) if path.startswith("code/")}
    versions: dict[str, str] = {}
    for ledger in ("data/raw", f"data/tokens/{run.task}", f"reports/train/{run.task}"):
        versions |= read_json(f"{ledger}/stats.json").get("versions", {})

    def format_sums(files: dict[str, str]) -> str:
        return "```\n" + "\n".join(f"{md5:36}  {printable(redact_path(path))}" for path, md5 in files.items()) + "\n```"

    repository = f" of {run.remote}" if run.remote else ""
    chain = list(describe_chain(read_chain(read_lock(), run.task)))
    return "\n\n".join(
        [
            "\n".join(f"{position}. {line}" for position, line in enumerate(chain, 1)),
            f"Git commit `{run.commit}`{repository}. Its `dvc.lock` contains these md5 sums (`.dir`: sum of a"
            " directory's listing).",
            f"Outputs, in the order of the stages:\n\n{format_sums(outs)}",
            f"Code of each stage (files with the hashes of the modules that it imports):\n\n{format_sums(code)}",
            f"Inputs:\n\n{format_sums(dict(sorted(deps.items())))}",
            "With " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) + ".",
        ]
    )


def render_reproduction(run: RecordedRun, source: dict[str, Any]) -> str:
    """Return the shell commands that download or recompute the model, and whether that was verified."""
    pull = ["dvc pull          # downloads the artifacts; or compute them (same bytes on the same kind of machine):"]
    commands = [
        f"git clone {run.remote or 'REPOSITORY'} lm-repro && cd lm-repro && git checkout {run.commit}",
        f"make {' '.join(list_make_targets(run))} && source .venv/bin/activate",
        *(pull if run.has_dvc_remote else []),
        f"dvc repro {' '.join(name for name in run.stages if name.startswith(('evaluate@', 'score@')))}",
    ]
    missing = (
        "\n\nThe text is not in the repository. It was read from `data.path`; use its md5 above to check another copy."
    )
    return (
        "```console\n"
        + "\n".join(f"$ {line}" for line in commands)
        + "\n```"
        + ("" if run.is_text_in_git or "hub" in source else missing)
        + render_verification(run)
    )


def render_verification(run: RecordedRun) -> str:
    """Return a paragraph on the verification of the commit by tools.verify, if there was one."""
    if (statement := read_statement(run.commit)) is None:
        return ""
    link = f" [{PUBLISHED_NAME}]({PUBLISHED_NAME}) is the statement of `python -m tools.verify` (in-toto, not signed)."
    return f"\n\n{summarize_statement(statement)}{link if is_passed(statement) else ''}"


def list_make_targets(run: RecordedRun) -> Iterator[str]:
    """Yield the make targets that install the packages that the stages need."""
    yield "env"
    if run.params["framework"] == "keras":
        yield "keras"
    if get_locked_params(run)[f"conf/hardware/{run.params['hardware']}.yaml"]["hardware"].get("ray"):
        yield "ray"


def render_license_section(license: str | None) -> str:
    if license is None:
        return "No license has been chosen for this model: it may not be used without its owner's permission."
    return f"`{license}`, for the model. The training data and the initial checkpoint, if any, have their own licenses."
