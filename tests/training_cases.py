"""Command-line overrides, curves and configurations that several tests of training use."""

from stages.model.hardware import Hardware, Launch

BEST = ["++trainer.load_best_model_at_end=true", "++trainer.save_strategy=epoch", "++trainer.eval_strategy=epoch"]
RUINED = ["learning_rate=5", "++trainer.lr_scheduler_type=constant_with_warmup", "++trainer.warmup_steps=20"]
NO_DROPOUT = {
    "causal": ["++model.config.resid_pdrop=0", "++model.config.embd_pdrop=0", "++model.config.attn_pdrop=0"],
    "mlm": ["++model.config.hidden_dropout_prob=0", "++model.config.attention_probs_dropout_prob=0"],
}


def read_losses(out):
    lines = (out / "report/plots/metrics/train/loss.tsv").read_text(encoding="utf-8").splitlines()
    column = lines[0].split("\t").index("loss")
    return [float(line.split("\t")[column]) for line in lines[1:]]


class ProcessConfig:
    """The process settings of a stage's config."""

    def __init__(self, processes_per_machine):
        launch = Launch(processes_per_machine=processes_per_machine, machines=1, rendezvous=None)
        self.hardware = Hardware(
            device="cpu", num_threads=1, per_device_batch_size=None, evaluate_batch_tokens=1, launch=launch
        )
