"""The programs of ``docs/integrations.md``: what they need around them, and how they are run, killed and run again.

As a script: runs a section's program once for each method, each time in a process that kills itself.
"""

import contextlib
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
TRAINER, LIGHTNING, ACCELERATE, LOOP = (
    "Hugging Face's Trainer",
    "Lightning",
    "accelerate",
    "A loop of your own",
)
METHOD = "rg.Dither(scale=2.0)"
METHODS = {
    "dither": METHOD,
    "decorrelate": "rg.Decorrelate(rank=8, every=4)",
    "deepfocus": "rg.DeepFocus(warmup=4, p_max=0.5)",
    "perforate": "rg.Perforate(patience=1, limit=2, period=7)",
    "perforated": "rg.Perforate(rule='perforated', patience=2, limit=2, candidate_limit=2, period=7)",
    "spectral": "rg.Spectral(warmup=3, every=3)",
}
_FEW = ("dither", "perforate")
TESTED = {TRAINER: tuple(METHODS), LIGHTNING: tuple(METHODS), ACCELERATE: _FEW, LOOP: _FEW}
"""Sections whose methods a callback carries are run with all of them; the others show `Session.save` and `rg.resume`,
which the sessions' own tests try with every method."""

EXAMPLES = 96
"""Of 8 a batch: 12 steps an epoch."""
KILL_AT = {TRAINER: 17 * 8, LIGHTNING: 17, ACCELERATE: 17 * 8, LOOP: 17 * 8}
"""How many examples, or batches, are read before the process is killed: after a checkpoint, in the second epoch."""


def program(section: str, *, attached: bool = True) -> str:
    """The program of a section after its diff is applied, or before."""
    (block,) = re.findall(r"```diff\n(.*?)```", SECTIONS[section], re.DOTALL)
    lines = block.splitlines()
    assert all(line[:2] in ("  ", "+ ", "- ", "+") for line in lines if line)
    keep = " +" if attached else " -"
    return "\n".join(line[2:] for line in lines if not line or line[0] in keep) + "\n"


# What the programs read.


class Counted(Dataset[Any]):
    """Examples; the process is killed when the given number has been read."""

    def __init__(self, examples: Any, kill_at: int | None) -> None:
        self._examples, self._left = examples, kill_at

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Any:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._examples[index]


class Batches:
    """Batches in a fixed order, going on where `load_state_dict` says."""

    def __init__(self, examples: Dataset[Any], count: int) -> None:
        self._examples, self._count, self._at = examples, count, 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        self._at %= self._count
        while self._at < self._count:
            self._at += 1
            yield self._examples[self._at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self._at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._at = state["at"]


def vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, 16, generator=generator) * torch.linspace(0.1, 3, 16) + 1
    return x, x[:, -4:].argmax(1)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def texts() -> tuple[list[str], list[int]]:
    """Sentences of SST-2 with their labels where the real data are, or made-up ones."""
    file = Path(os.environ.get("RETROGRADE_DATA", "")) / "sst2" / "train.parquet"
    if file.is_file():
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(file).slice(0, EXAMPLES).to_pydict()
        return rows["text"], rows["label"]
    words = ("a", "dull", "film", "fine", "plot", "the", "with", "warm")
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(words), (EXAMPLES, 8), generator=generator).tolist()
    made = [[words[i] for i in row] for row in chosen]
    return [" ".join(row) for row in made], [int(row.count("fine") + row.count("warm") > 1) for row in made]


def text_namespace(kill_at: int | None) -> dict[str, Any]:
    """A sequence classifier, its tokenizer made of the texts, and their tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers.trainer_utils import get_last_checkpoint

    sentences, labels = texts()
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(sentences, trainers.WordLevelTrainer(special_tokens=["[UNK]", "[PAD]"]))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", model_max_length=16
    )
    tokens = tokenizer(sentences, truncation=True)
    rows = [{**{name: tokens[name][i] for name in tokens}, "labels": labels[i]} for i in range(EXAMPLES)]
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=tokenizer.pad_token_id,
    )

    def arguments(*args: Any, **options: Any) -> Any:
        return transformers.TrainingArguments(*args, use_cpu=True, disable_tqdm=True, **options)

    return {
        "model": transformers.BertForSequenceClassification(config),
        "tokenizer": tokenizer,
        "train_set": Counted(rows, kill_at),
        "validation_set": rows[:24],
        "Trainer": transformers.Trainer,
        "TrainingArguments": arguments,
        "get_last_checkpoint": get_last_checkpoint,
    }


def lightning_namespace(kill_at: int | None) -> dict[str, Any]:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", self.training_step(batch, index))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    x, y = vectors()
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, EXAMPLES, 8)]

    def trainer(**options: Any) -> Any:
        quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
        return Trainer(accelerator="cpu", **quiet, **options)

    return {
        "module": Module(),
        "train_loader": Batches(Counted(batches, kill_at), len(batches)),
        "validation_loader": DataLoader(TensorDataset(x, y), 32),
        "Trainer": trainer,
        "ModelCheckpoint": ModelCheckpoint,
    }


def loop_namespace(kill_at: int | None) -> dict[str, Any]:
    loader = DataLoader(Counted(TensorDataset(*vectors()), kill_at), 8)
    return {"model": network(), "train_loader": loader, "nn": nn, "os": os, "Path": Path}


def accelerate_namespace(kill_at: int | None) -> dict[str, Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    # A program makes one, and a process of tests several.
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    shuffled = DataLoader(Counted(TensorDataset(*vectors()), kill_at), 8, shuffle=True)
    return {**loop_namespace(None), "train_loader": shuffled, "Accelerator": lambda: Accelerator(cpu=True)}


NAMESPACES = {
    TRAINER: text_namespace,
    LIGHTNING: lightning_namespace,
    ACCELERATE: accelerate_namespace,
    LOOP: loop_namespace,
}


# Running.


def run(
    section: str, method: str | None, folder: Path, kill_at: int | None = None, source: str | None = None
) -> dict[str, Any]:
    """Run a section's program in a folder, and return what its names stand for afterwards.

    Args:
        section: of the page.
        method: in place of the page's; None runs the program before the diff.
        folder: made, and the working directory.
        kill_at: examples, or batches, after which the process is killed.
        source: another program.
    """
    text = program(section, attached=method is not None) if source is None else source
    assert method is None or METHOD in text
    text = text.replace(METHOD, METHODS.get(method or "", ""))
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    names = {"torch": torch, **NAMESPACES[section](kill_at)}
    with contextlib.chdir(folder), warnings.catch_warnings():
        # Others' warnings are theirs; ours say that something is wrong with the page.
        warnings.simplefilter("ignore")
        from retrograde.errors import RetrogradeWarning

        warnings.simplefilter("error", RetrogradeWarning)
        # The trainer's own schedule ends at a rate of zero, and the last evaluation comes after it.
        warnings.filterwarnings("ignore", "Perforate declares a plateau")
        exec(compile(text, "docs/integrations.md", "exec"), names)
    return names


def kill_all(section: str, folder: Path) -> None:
    """Run a section's program once for each method, each in a child that is killed; write its exit code."""
    NAMESPACES[section](None)  # What they import, they share.
    for method in TESTED[section]:
        child = os.fork()
        if not child:
            run(section, method, folder / method, KILL_AT[section])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{method} {os.waitstatus_to_exitcode(status)}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_all(sys.argv[1], Path(sys.argv[2]))
