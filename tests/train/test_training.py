"""The Trainer: accumulation, losses and figures, through transformers' own loop."""

import copy
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from toys import (
    END,
    MODEL_TASKS,
    add_control_tokens,
    draw_text_ids,
    make_toy_blocks,
    make_toy_model,
    make_toy_objective,
    make_toy_trainer,
    save_blocks,
)
from transformers import TrainerCallback

from stages.figures.metrics import full_precision
from stages.model.block_loss import compute_block_loss
from stages.model.isolation import isolate_segments
from stages.model.masking import IGNORED

NUM_BLOCKS, BLOCK_SIZE = 16, 24
MODELS = ["gpt2", "roberta", "bert"]


# -- the loss ----------------------------------------------------------------------------------------------------------


class Gradients(TrainerCallback):
    """Records the gradients of each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.steps.append(flat(parameter.grad for parameter in model.parameters()))


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def relative_difference(one, other):
    return float((one - other).norm() / other.norm())


def step(directory, model_type, per_device_batch_size, **arguments):
    """Gradient, new weights and reported loss of one optimizer step over 16 blocks."""
    model, gradients = make_toy_model(model_type), Gradients()
    blocks = make_toy_blocks(
        directory / f"blocks-{per_device_batch_size}", MODEL_TASKS[model_type], NUM_BLOCKS, BLOCK_SIZE
    )
    defaults = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    trainer = make_toy_trainer(
        directory,
        model,
        make_toy_objective(model),
        blocks,
        per_device_train_batch_size=per_device_batch_size,
        gradient_accumulation_steps=NUM_BLOCKS // per_device_batch_size,
        max_steps=1,
        max_grad_norm=0.0,
        logging_steps=1,
        callbacks=[gradients],
        **{**defaults, **arguments},
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == len(gradients.steps) == 1
    return gradients.steps[0], flat(model.parameters()), losses[0], blocks


@pytest.fixture(scope="module", params=MODELS)
def whole_step(request, tmp_path_factory):
    return request.param, *step(tmp_path_factory.mktemp("step"), request.param, NUM_BLOCKS)


@pytest.mark.parametrize("per_device_batch_size", [1, 4])
def test_step_accumulated_has_the_gradient_weights_and_loss_of_the_whole_batch(
    whole_step, tmp_path, per_device_batch_size
):
    model_type, gradient, weights, loss, _ = whole_step
    accumulated = step(tmp_path, model_type, per_device_batch_size)
    assert relative_difference(accumulated[0], gradient) < 1e-5
    assert relative_difference(accumulated[1], weights) < 1e-5
    assert accumulated[2] == pytest.approx(loss, rel=1e-5)


def test_step_accumulated_with_adamw_ends_with_the_weights_of_the_whole_batch(tmp_path):
    # A large epsilon: AdamW blows up the rounding of gradients that are 0 by symmetry to whole steps.
    adamw = {"optim": "adamw_torch_fused", "learning_rate": 0.01, "adam_epsilon": 1e-3}
    whole, accumulated = (step(tmp_path, "bert", size, **adamw)[1] for size in (NUM_BLOCKS, 4))
    assert relative_difference(accumulated, whole) < 1e-5
    assert relative_difference(whole, flat(make_toy_model("bert").parameters())) > 1e-3


def test_step_has_the_gradient_and_loss_of_the_plain_mean_over_tokens(whole_step):
    model_type, gradient, _, loss, blocks = whole_step
    model = make_toy_model(model_type, use_cache=False).train()
    objective = make_toy_objective(model)
    batch = objective.build_batch(blocks[range(NUM_BLOCKS)], range(NUM_BLOCKS), 3, 0)
    labels = batch.pop("labels")
    logits = model(**isolate_segments(batch, model)).logits
    if MODEL_TASKS[model_type] == "causal":
        logits, labels = logits[:, :-1], batch["input_ids"][:, 1:]
    else:
        counts = (labels.view(4, 4, -1) != IGNORED).sum((1, 2))
        assert len(set(counts.tolist())) > 1  # micro-batches with unequal token counts: a mean of means is wrong
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    assert relative_difference(gradient, flat(parameter.grad for parameter in model.parameters())) < 1e-5
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)


def test_step_of_blocks_without_a_masked_token_has_loss_zero(tmp_path):
    # Blocks of control tokens only: no token can be chosen.
    blocks, model = save_blocks(tmp_path, np.zeros((4, 8))), make_toy_model("roberta")
    logs = {"logging_steps": 1, "logging_nan_inf_filter": False}
    trainer = make_toy_trainer(
        tmp_path, model, make_toy_objective(model), blocks, per_device_train_batch_size=4, max_steps=1, **logs
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0.0
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("model_type", MODELS)
def test_training_with_isolated_documents_gives_the_model_each_document_alone(tmp_path, model_type):
    task, model, seen = MODEL_TASKS[model_type], make_toy_model(model_type), []

    def record(_, args, inputs, outputs):
        if model.training:
            seen.append((inputs["input_ids"], outputs.logits.detach()))

    model.register_forward_hook(record, with_kwargs=True)
    ids = add_control_tokens(task, *(draw_text_ids(length, length).tolist() for length in (7, 9, 5)))
    blocks = save_blocks(tmp_path / "blocks", np.array([ids]))
    trainer = make_toy_trainer(
        tmp_path,
        model,
        make_toy_objective(model),
        blocks,
        per_device_train_batch_size=1,
        max_steps=1,
        learning_rate=0.0,
    )
    trainer.train()
    (input_ids, hidden), *_ = seen
    logits = model.get_output_embeddings()(hidden)
    first = {"causal": 8, "mlm": 9}[task]  # the control token before the second document
    last = first + {"causal": 10, "mlm": 11}[task]
    with full_precision(model):
        alone = make_toy_model(model_type)(input_ids[:, first:last]).logits
    torch.testing.assert_close(logits[:, first:last], alone, atol=1e-5, rtol=1e-5)


# -- validation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODELS)
def test_trainer_evaluate_reports_the_block_loss_of_the_metrics(tmp_path, model_type):
    task, model = MODEL_TASKS[model_type], make_toy_model(model_type)
    train, validation = (make_toy_blocks(tmp_path / str(seed), task, 7, BLOCK_SIZE, seed) for seed in (0, 1))
    objective = make_toy_objective(model)
    trainer = make_toy_trainer(
        tmp_path,
        model,
        objective,
        train,
        validation,
        per_device_train_batch_size=4,
        num_train_epochs=2,
        eval_strategy="epoch",
        learning_rate=0.01,
        evaluate_batch_tokens=50,
    )
    before = compute_block_loss(model, objective, validation, 4096)
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logged) == 2
    assert logged[-1] == pytest.approx(compute_block_loss(copy.deepcopy(model), objective, validation, 4096), rel=1e-6)
    assert logged[-1] != pytest.approx(before, rel=1e-3)


def test_trainer_evaluate_while_training_in_bf16_is_in_fp32(tmp_path):
    model = make_toy_model("roberta")
    blocks, objective = make_toy_blocks(tmp_path, "mlm", 8, BLOCK_SIZE), make_toy_objective(model)
    trainer = make_toy_trainer(
        tmp_path,
        model,
        objective,
        blocks,
        per_device_train_batch_size=8,
        max_steps=2,
        bf16=True,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    untouched = make_toy_model("roberta")
    untouched.load_state_dict(model.state_dict())
    exact = compute_block_loss(untouched, objective, blocks, 4096)
    logged = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert logged == exact
    assert trainer.evaluate()["eval_loss"] == exact
    ids = torch.from_numpy(draw_text_ids(8).astype(np.int64))[None]
    assert not torch.equal(model.eval()(ids).logits, untouched(ids).logits)  # bf16 would show


def test_trainer_evaluate_twice_gives_the_same_digits(tmp_path):
    model = make_toy_model("bert")
    blocks = make_toy_blocks(tmp_path, "mlm", 8, BLOCK_SIZE)
    trainer = make_toy_trainer(tmp_path, model, make_toy_objective(model), blocks)
    assert trainer.evaluate() == trainer.evaluate()


# -- document ends -----------------------------------------------------------------------------------------------------


def test_training_on_two_repeated_documents_teaches_where_they_end(tmp_path):
    texts = [[7, 8, 9, 10, 11], [20, 21, 22]]
    stream = add_control_tokens("causal", *(texts * 32))[: 16 * 16]
    blocks, model = save_blocks(tmp_path / "blocks", np.array(stream).reshape(16, 16)), make_toy_model("gpt2")
    model.config.pad_token_id = END  # transformers' collator would set their labels to -100
    trainer = make_toy_trainer(
        tmp_path,
        model,
        make_toy_objective(model),
        blocks,
        per_device_train_batch_size=8,
        max_steps=80,
        learning_rate=0.02,
        lr_scheduler_type="constant",
    )
    trainer.train()
    predictions = defaultdict(list)
    for text in texts:
        with full_precision(model):
            predictions[len(text)] = model(torch.tensor([[END, *text]])).logits[0].argmax(-1).tolist()
    # The first token of a document determines all others and its end.
    assert predictions[5][1:] == [8, 9, 10, 11, END]
    assert predictions[3][1:] == [21, 22, END]


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "roberta"])
def test_training_compiled_compiles_once_and_has_the_losses_of_training_uncompiled(tmp_path, monkeypatch, model_type):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))

    def losses(**arguments):
        model = make_toy_model(model_type)
        # 7 blocks in batches of 4: the last batch of an epoch is filled up.
        blocks = make_toy_blocks(tmp_path / "blocks", MODEL_TASKS[model_type], 7, BLOCK_SIZE)
        common = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 0.01, "logging_steps": 1}
        trainer = make_toy_trainer(
            tmp_path, model, make_toy_objective(model), blocks, eval_strategy="epoch", **common, **arguments
        )
        trainer.train()
        assert model(torch.tensor([[7, 8]])).logits.shape[-1] == 50  # the output embedding is restored
        return [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]

    plain = losses()
    torch._dynamo.reset()
    counters.clear()
    assert losses(torch_compile=True) == pytest.approx(plain, rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert any((tmp_path / "inductor").iterdir())
