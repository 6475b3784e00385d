"""The model card of a published model: metadata that the Hub understands, and how the model came to be, in words.

The same for the same commit, artifacts and conf/publish.yaml: it holds no time, and nothing of the machine's paths.
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
from stages.download.schema import without_credentials
from stages.figures.names import SHORT_NAMES
from tools.chain import describe_chain, read_chain
from tools.lock_history import read_lock

SPLITS = ("train", "validation", "test")
MOST_VALUES = 20  # of a group, that are all shown
PATHS = ("path", "storage")  # keys of params.yaml and conf/ whose values may be paths
PIPELINE = {"causal": "text-generation", "mlm": "fill-mask"}
TITLE = {"causal": "Causal language modeling", "mlm": "Masked language modeling"}
MEANING = {
    "bits_per_byte": "bits per UTF-8 byte of text, less is better: each document on its own, windows of {context}"
    " tokens; compares with any model and lossless tokenizer on the same documents",
    "pseudo_bits_per_byte": "bits per UTF-8 byte of text, less is better: every token predicted once from both sides,"
    " windows of {context} tokens; compares within one tokenizer, never with bits_per_byte",
    "loss": "nats per predicted token over blocks of {block_size} tokens; belongs to that size and this tokenizer",
    "perplexity": "exp(loss)",
    "masked_loss": "nats per masked token over blocks of {block_size} tokens, masks that are the same in all"
    " evaluations; belongs to that size and this tokenizer",
    "masked_perplexity": "exp(masked_loss)",
    "documents": "evaluated",
    "tokens": "of text in them",
    "bytes": "of text in them",
}  # docs/metrics.md, in short


class RecordedRun(NamedTuple):
    """What made the artifacts in the workspace, as git and dvc.lock know it."""

    task: str
    commit: str
    remote: str | None
    """URL of the git repository, without credentials; None where it has none that others could reach."""
    stages: dict[str, Any]
    """Stages of dvc.lock that the model and its figures come from, first to last."""
    text_in_git: bool
    """Whether git holds the text at data.path."""
    dvc_remote: bool
    """Whether the repository names a DVC remote."""

    @property
    def params(self) -> dict[str, Any]:
        """What the stages used of params.yaml: what all tasks share, and the section of this one."""
        values: dict[str, Any] = locked_params(self)[PARAMS.name]
        return values

    @property
    def model(self) -> dict[str, Any]:
        """What the stages used of conf/model."""
        values: dict[str, Any] = locked_params(self)[f"conf/model/{self.params['tasks'][self.task]['model']}.yaml"]
        return values

    @property
    def start(self) -> str | None:
        """The task that this one started from; None: from no other."""
        start = self.params["tasks"][self.task]["start"]
        return None if start == NO_START else str(start)

    @property
    def objective(self) -> str:
        """causal or mlm."""
        return str(locked_params(self)[f"conf/task/{self.task}.yaml"]["objective"]["name"])


def make_card(run: RecordedRun, repository: str | None, license: str | None, language: list[str] | None) -> ModelCard:
    """The card; `repository` None leaves its place open."""
    data, config = read_json("data/raw/stats.json"), read_json(f"models/{run.task}/config.json")
    metrics = read_json(f"reports/evaluate/{run.task}/metrics.json")[run.task]
    name = (repository or f"OWNER/{run.params['tasks'][run.task]['model']}").partition("/")[2]
    metadata = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=PIPELINE[run.objective],
        tags=[config["model_type"], "lm-repro"],
        base_model=base_model(run),
        datasets=[data["source"]["hub"]] if "hub" in data["source"] else None,
        model_name=name,
        eval_results=list(results(run.objective, metrics, data["source"])),
    )
    sections = [
        f"# {name}\n\n{introduction(run, config, data['source'])}",
        f"## Use\n\n{usage(run, repository or f'OWNER/{name}')}",
        f"## Data\n\n{data_section(run, data)}",
        f"## Results\n\n{metrics_section(run, metrics)}",
        f"## Samples\n\n{samples(run.task)}",
        f"## Parameters\n\n{parameters(run)}",
        f"## Where it comes from\n\n{lineage(run)}",
        f"## Make it again\n\n{reproduction(run, data['source'])}",
        f"## License\n\n{license_section(license)}",
    ]
    return ModelCard(
        f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(section.strip() for section in sections) + "\n"
    )


def base_model(run: RecordedRun) -> str | None:
    """The Hub repository of the checkpoint that training started from; None from scratch or from a local directory."""
    model = run.model
    return model["path"] if run.start is None and not model["from_scratch"] and model["revision"] else None


def results(objective: str, metrics: dict[str, Any], source: dict[str, Any]) -> list[EvalResult]:
    """Each figure of the trained model on each split; base figures and counts stand in the text."""
    return [
        EvalResult(
            task_type=PIPELINE[objective],
            task_name=TITLE[objective],
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
        if key in MEANING and isinstance(value, float)
    ]


def introduction(run: RecordedRun, config: dict[str, Any], source: dict[str, Any]) -> str:
    start = f"fine-tuned from `{base}`" if (base := base_model(run)) else "trained from scratch"
    if len(links := read_chain(read_lock(), run.task)) > 1:
        start = f"trained further from {code_span(links[1].task)}, a model of this repository"
    elif not base and not run.model["from_scratch"]:
        start = "fine-tuned from a local checkpoint, pinned by the hashes under Parameters"
    size = sum(math.prod(shape) for shape in shapes(Path(f"models/{run.task}"))) / 1e6
    return (
        f"{TITLE[run.objective]}: `{config['architectures'][0]}` with {size:.1f} M parameters, {start} on"
        f" {describe_source(source)}, by lm-repro, a pipeline whose every number can be traced to its inputs. This card"
        " was written from its records."
    )


def shapes(directory: Path) -> list[list[int]]:
    """The shape of every stored tensor."""
    found = []
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:  # reads the header alone
            found += [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    return found


def describe_source(source: dict[str, Any]) -> str:
    if "hub" in source:
        return f"[{source['hub']}](https://huggingface.co/datasets/{source['hub']}) at commit `{source['commit']}`"
    return f"`{printable(source['files'])}`"


def usage(run: RecordedRun, repository: str) -> str:
    prompt = locked_params(run)[f"conf/task/{run.task}.yaml"]["samples"]["prompts"][:1] or ["Once {mask} a time"]
    # Both are Python; the second leaves no character that is not printable.
    text = json.dumps(prompt[0], ensure_ascii=False) if prompt[0].isprintable() else repr(prompt[0])
    load = f'from transformers import pipeline\n\nmodel = pipeline("{PIPELINE[run.objective]}", model="{repository}")\n'
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


def data_section(run: RecordedRun, data: dict[str, Any]) -> str:
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
    twins = data["held_out_with_near_duplicate_in_train"]
    looked = twins is not None and twins.get("looked_for")
    near = f"{twins['validation']} of validation and {twins['test']} of test" if looked else "not looked for"
    return "\n".join(
        [
            f"{describe_source(data['source'])}{revision}{sample}.",
            f"{data['records_in']:,} records were read ({', '.join(dropped) or 'none'} left out),"
            f" {data['answers_out']:,} of {data['answers_in']:,} answers kept. Held-out documents"
            f" with a near duplicate in train: {near}.",
            *([f"This task uses the sources {', '.join(map(code_span, chosen))}."] if chosen else []),
            *([f"Only completions are trained on: {', '.join(counted)}. The rest is given."] if counted else []),
            "",
            "| split | records | documents | tokens | bytes |\n|---|---|---|---|---|",
            *rows,
        ]
    )


def metrics_section(run: RecordedRun, metrics: dict[str, Any]) -> str:
    context = locked_params(run)[f"conf/task/{run.task}.yaml"]["evaluate"]["context"]
    rows = ["| metric | test | validation | |\n|---|---|---|---|"]
    for key in metrics["test"]:
        if key == "groups":
            continue
        values = " | ".join(number(metrics[split][key]) for split in SPLITS[:0:-1])
        rows.append(f"| {key} | {values} | {meaning(key, context=context, block_size=run.params['block_size'])} |")
    return "\n".join(
        [
            *rows,
            "",
            "Experiments are chosen by validation; test is for reporting. Figures are computed in fp32.",
            *group_sections(metrics),
            *score_section(run),
        ]
    )


def score_section(run: RecordedRun) -> Iterator[str]:
    """A table of the accuracy on minimal pairs and questions, where the model was scored on any."""
    if f"score@{run.task}" not in run.stages:
        return
    figures = read_json(f"reports/score/{run.task}/metrics.json")[run.task]
    yield f"\nAccuracy on minimal pairs and multiple-choice questions, by {figures['method'].replace('_', '-')}\n"
    yield "| items | correct | 95 % interval | of |\n|---|---|---|---|"
    rows = {"all": figures}
    for group, values in figures["groups"].items():
        rows |= {f"{group}: {value}": found for value, found in values.items()}
    for name, found in list(rows.items())[:MOST_VALUES]:
        shares = found["accuracy"]["sum"]
        interval = f"{shares['low']:.1%} to {shares['high']:.1%}"
        yield f"| {code_span(name)} | {shares['share']:.1%} | {interval} | {found['items']:,} |"


def group_sections(metrics: dict[str, Any]) -> Iterator[str]:
    """A table for each group that has more than one value in test, and one of the sources that are only evaluated."""
    for group, values in metrics["test"].get("groups", {}).items():
        if len(values) > 1:
            validation = metrics["validation"].get("groups", {}).get(group, {})
            yield group_section(f"By {code_span(group)}", {", test": values, ", validation": validation})
    if texts := metrics.get("texts"):
        yield group_section("Texts that are only evaluated", {"": texts})


def group_section(title: str, columns: dict[str, dict[str, Any]]) -> str:
    """The metric of each value, with that before training; of at most MOST_VALUES, those with the most text first."""
    values = next(iter(columns.values()))
    metric = next(name for figures in values.values() for name in figures if name in SHORT_NAMES)
    head = [title, "documents", "bytes", *(f"{metric}{column} (before training)" for column in columns)]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for value, figures in list(values.items())[:MOST_VALUES]:
        cells = [code_span(value), number(figures["documents"]), number(figures["bytes"])]
        cells += [before_after(column.get(value, {}), metric) for column in columns.values()]
        rows.append("| " + " | ".join(cells) + " |")
    if (left := len(values) - MOST_VALUES) > 0:
        rows.append(f"\n{left:,} values more are in `reports/evaluate`.")
    return "\n" + "\n".join(rows)


def before_after(figures: dict[str, Any], metric: str) -> str:
    return f"{number(figures[metric])} ({number(figures[f'base_{metric}'])})" if metric in figures else ""


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def code_span(text: str) -> str:
    """`text`, which anyone may have written, as code in a cell of a Markdown table."""
    shown = printable(text).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall("`+", shown)), default=0) + 1)
    pad = " " if len(fence) > 1 or not shown.strip() else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def meaning(key: str, **values: int) -> str:
    """What the figure `key` says, with its unit and what it may be compared with."""
    if key.startswith("base_"):
        return f"{key.removeprefix('base_')} of the model before training"
    if key.endswith("_se"):
        return f"standard error of {key.removesuffix('_se')} over documents"
    return MEANING[key].format(**values)


def samples(task: str) -> str:
    """The page of samples that evaluate wrote, without its title."""
    return Path(f"reports/samples/{task}.md").read_text(encoding="utf-8").partition("\n")[2].strip()


def parameters(run: RecordedRun) -> str:
    """Every value that dvc.lock tracks for these stages, by file; nothing else decided."""
    return "\n\n".join(
        f"`{file}`\n\n```yaml\n{yaml.safe_dump(public(values), sort_keys=False, allow_unicode=True)}```"
        for file, values in locked_params(run).items()
    )


def locked_params(run: RecordedRun) -> dict[str, Any]:
    """params.yaml and the files of conf/, each with the keys that the stages used, nested, as dvc.lock holds them."""
    found: dict[str, Any] = {PARAMS.name: {}}
    for stage in run.stages.values():
        for file, values in stage.get("params", {}).items():
            keys = found.setdefault(file, {})
            for key, value in values.items():
                add(keys, key, value)
    return found


def add(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Add the value of a dotted key; of a section that is there already, the other keys stay."""
    section, _, rest = dotted.partition(".")
    if rest:
        add(values.setdefault(section, {}), rest, value)
    elif isinstance(value, dict):
        values[section] = {**(values.get(section) or {}), **copy.deepcopy(value)}
    else:
        values[section] = value


def public(value: Any) -> Any:
    """`value` without credentials in URLs, and with local absolute paths cut down to their last part.

    Such paths name people and machines.
    """
    if isinstance(value, dict):
        return {
            key: local_name(item) if key in PATHS and isinstance(item, str) else public(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [public(item) for item in value]
    return without_credentials(value) or value if isinstance(value, str) else value


def local_name(path: str) -> str:
    local = PurePath(path).is_absolute() or path.startswith(("~", ".."))
    return f".../{PurePath(path).name}" if local else without_credentials(path) or path


def lineage(run: RecordedRun) -> str:
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

    def table(files: dict[str, str]) -> str:
        return "```\n" + "\n".join(f"{md5:36}  {printable(local_name(path))}" for path, md5 in files.items()) + "\n```"

    repository = f" of {run.remote}" if run.remote else ""
    chain = list(describe_chain(read_chain(read_lock(), run.task)))
    return "\n\n".join(
        [
            "\n".join(f"{number}. {line}" for number, line in enumerate(chain, 1)),
            f"Git commit `{run.commit}`{repository}, whose `dvc.lock` holds these md5 sums (`.dir`: of a directory's"
            " listing).",
            f"Outputs, in the order of the stages:\n\n{table(outs)}",
            f"Code of each stage (files of hashes of the modules that it imports):\n\n{table(code)}",
            f"Inputs:\n\n{table(dict(sorted(deps.items())))}",
            "With " + ", ".join(f"{name} {number}" for name, number in sorted(versions.items())) + ".",
        ]
    )


def reproduction(run: RecordedRun, source: dict[str, Any]) -> str:
    pull = ["dvc pull          # the artifacts as they were; or, with the same bytes on the same kind of machine:"]
    commands = [
        f"git clone {run.remote or 'REPOSITORY'} lm-repro && cd lm-repro && git checkout {run.commit}",
        f"make {' '.join(environments(run))} && source .venv/bin/activate",
        *(pull if run.dvc_remote else []),
        f"dvc repro {' '.join(name for name in run.stages if name.startswith(('evaluate@', 'score@')))}",
    ]
    missing = (
        "\n\nThe text is not in the repository: it was at `data.path`, and its md5 above tells whether another copy is"
        " the same."
    )
    return (
        "```console\n"
        + "\n".join(f"$ {line}" for line in commands)
        + "\n```"
        + ("" if run.text_in_git or "hub" in source else missing)
    )


def environments(run: RecordedRun) -> Iterator[str]:
    """The targets of make that install what the stages need."""
    yield "env"
    if run.params["framework"] == "keras":
        yield "keras"
    if locked_params(run)[f"conf/hardware/{run.params['hardware']}.yaml"]["hardware"].get("ray"):
        yield "ray"


def license_section(license: str | None) -> str:
    if license is None:
        return "None has been chosen for this model: it may not be used without its owner's permission."
    return f"`{license}`, for the model. Its data, and a checkpoint it started from, have licenses of their own."
