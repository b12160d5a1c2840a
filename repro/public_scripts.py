"""Ten training scripts as people publish them, each with one line added: does every method train them at its defaults?

    python repro/public_scripts.py [--scripts vae gan …] [--methods plain dither …] [--steps 2000]

A VAE, a GAN with two optimizers, DQN with a target network (copied, or as a Polyak average), an LSTM language model, a
U-Net, a vision transformer, a GPT, a Siamese network, a Lightning module and a `Trainer` of transformers; tiny, on
bundled or synthetic data. The loss is the mean of ten evaluations of a fixed batch in the last twentieth of a run; it
is compared with plain backpropagation's from the same seed, and two more seeds of plain backpropagation show how far
chance alone moves it. Every run leaves a row in ``runs/public-scripts.jsonl``, so that what was interrupted goes on; at
the end ``results/public-scripts.json`` is written. About half an hour on one core.

Results: results/public-scripts.json
"""

import copy
import functools
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from reports import arguments, head
from torch import Tensor, nn
from torch.nn import functional as F

import retrograde as rg
from retrograde.engine.slots import Method
from retrograde.lab import data, files

ROWS = Path("runs/public-scripts.jsonl")

METHODS: dict[str, Method] = {
    "exact": rg.Exact(),
    "dither": rg.Dither(),
    "deepfocus": rg.DeepFocus(),
    "decorrelate": rg.Decorrelate(),
    # These scripts report no scores: without a period no dendrite would ever grow.
    "perforate": rg.Perforate(period=500),
    "spectral": rg.Spectral(),
}
PLAIN_SEEDS = (0, 1, 2)
ALLOWED = 1.05
TOLERANCE = 1e-5
EVALUATIONS = 10

Probe = Callable[[Any], Tensor]


class Run:
    """What a script is handed: it attaches the method, notes the loss near the end, and checks what is left.

    Attributes:
        steps: how many the script makes.
        folder: where it may write.
        losses: of the evaluations.
        finite: whether all parameters were, at the end.
        checkpoint: largest relative difference between a model's output and its reloaded checkpoint's.
        folded: the same for ``session.fold()``; None for plain backpropagation.
    """

    def __init__(self, method: Method | None, steps: int, folder: Path) -> None:
        self.method, self.steps, self.folder = method, steps, folder
        self.losses: list[float] = []
        self.finite = True
        self.checkpoint = 0.0
        self.folded: float | None = None

    def attach(self, model: nn.Module) -> rg.Session | None:
        return None if self.method is None else rg.attach(model, self.method)

    @torch.no_grad()
    def watch(self, step: int, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        """Evaluate, where `step` (from 0) is one of the ten in the last twentieth; of a short run the last one."""
        left, last = self.steps - 1 - step, max(1, self.steps // 20)
        if left >= last or left % max(1, last // EVALUATIONS):
            return
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.eval()
            self.losses.append(float(loss()))
            model.train()

    def check(
        self,
        model: nn.Module,
        session: rg.Session | None,
        fresh: nn.Module,
        probe: Probe,
        reload: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Compare a trained model with its checkpoint and with its folded copy.

        Args:
            model: as the script has left it.
            session: its session.
            fresh: another one, as the script makes it; the method is attached to it before it is loaded.
            probe: a model's output.
            reload: loads `fresh` as the framework does; None saves and loads by `torch.save` and `torch.load`.
        """
        other = self.attach(fresh)
        if reload is None:
            file = self.folder / "checkpoint.pt"
            torch.save({"model": model.state_dict(), "session": session and session.state_dict()}, file)
            saved = torch.load(file)
            fresh.load_state_dict(saved["model"])
            if other is not None:
                other.load_state_dict(saved["session"])
        else:
            reload(fresh)
        values = [*model.parameters(), *model.buffers()]
        self.finite &= all(bool(value.isfinite().all()) for value in values)
        self.checkpoint = max(self.checkpoint, _difference(model, fresh, probe))
        if session is not None:
            self.folded = max(self.folded or 0.0, _difference(model, session.fold(), probe))


@torch.no_grad()
def _difference(model: nn.Module, other: nn.Module, probe: Probe) -> float:
    mine, theirs = probe(model.eval()), probe(other.eval())
    return float((mine - theirs).abs().max() / mine.abs().max().clamp_min(1))


# Data.


@functools.cache
def digits(*, standardise: bool = True) -> data.Data:
    return data.load("digits", standardise=standardise)


def loader(*tensors: Tensor, batch_size: int) -> Iterator[list[Tensor]]:
    """Shuffled batches for ever."""
    rows = torch.utils.data.TensorDataset(*tensors)
    batches = torch.utils.data.DataLoader(rows, batch_size, shuffle=True, drop_last=True)
    while True:
        yield from batches


@functools.cache
def corpus() -> tuple[Tensor, int]:
    """20,000 characters of a language in which two letters decide what may follow, and its alphabet's size."""
    letters, random = 16, torch.Generator().manual_seed(0)
    chances = torch.softmax(2 * torch.randn(letters, letters, letters, generator=random), -1).cumsum(-1)
    text = [0, 1]
    for u in torch.rand(20_000, generator=random).tolist():
        text.append(min(int((chances[text[-2], text[-1]] < u).sum()), letters - 1))
    return torch.tensor(text), letters


def windows(text: Tensor, length: int, count: int) -> tuple[Tensor, Tensor]:
    """Random stretches of the text, and their next characters."""
    starts = torch.randint(len(text) - length - 1, (count, 1)) + torch.arange(length)
    return text[starts], text[starts + 1]


# 1. Variational autoencoder.


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 128)
        self.fc_mu = nn.Linear(128, 8)
        self.fc_logvar = nn.Linear(128, 8)
        self.fc3 = nn.Linear(8, 128)
        self.fc4 = nn.Linear(128, 64)

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return mu + torch.randn_like(mu) * torch.exp(0.5 * logvar) if self.training else mu

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.relu(self.fc1(x.flatten(1)))
        mu, logvar = self.fc_mu(h), self.fc_logvar(h)
        z = self.reparameterize(mu, logvar)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mu, logvar


def vae(run: Run) -> None:
    images = digits(standardise=False)
    test = images.test.inputs[:256]
    model = VAE()
    session = run.attach(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss_function(x: Tensor) -> Tensor:
        recon, mu, logvar = model(x)
        bce = F.binary_cross_entropy(recon, x.flatten(1), reduction="sum")
        kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return (bce + kld) / len(x)

    for step, (x,) in zip(range(run.steps), loader(images.train.inputs, batch_size=64), strict=False):
        optimizer.zero_grad()
        loss_function(x).backward()
        optimizer.step()
        run.watch(step, model, lambda: loss_function(test))
    run.check(model, session, VAE(), lambda m: m(test)[0])


# 2. Generative adversarial network: two networks and two optimizers, with two sessions or one.


def generator() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.LeakyReLU(0.2)),
        *(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.LeakyReLU(0.2)),
        *(nn.Linear(128, 64), nn.Tanh()),
    )


def discriminator() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    )


def networks() -> nn.ModuleDict:
    return nn.ModuleDict({"G": generator(), "D": discriminator()})


def gan(run: Run, *, together: bool = False) -> None:
    images = digits(standardise=False)
    real_images, test = (2 * part.inputs.flatten(1) - 1 for part in (images.train, images.test))
    both = networks()
    netG, netD = both["G"], both["D"]
    attached = [both] if together else [netG, netD]
    sessions = [run.attach(network) for network in attached]
    optimizerG = torch.optim.Adam(netG.parameters(), lr=5e-4, betas=(0.5, 0.999))
    optimizerD = torch.optim.Adam(netD.parameters(), lr=5e-4, betas=(0.5, 0.999))
    criterion = nn.BCEWithLogitsLoss()
    fixed_noise = torch.randn(len(test), 16)
    ones, zeros = torch.ones(32, 1), torch.zeros(32, 1)

    def energy_distance() -> Tensor:
        fake = netG(fixed_noise)
        return (
            2 * torch.cdist(fake, test).mean()
            - torch.cdist(fake, fake).mean()
            - torch.cdist(test, test).mean()
        )

    for step, (real,) in zip(range(run.steps), loader(real_images, batch_size=32), strict=False):
        fake = netG(torch.randn(32, 16))
        netD.zero_grad()
        criterion(netD(real), ones).backward()
        criterion(netD(fake.detach()), zeros).backward()
        optimizerD.step()
        netG.zero_grad()
        criterion(netD(fake), ones).backward()
        optimizerG.step()
        run.watch(step, netG, energy_distance)
    if together:
        run.check(both, *sessions, networks(), lambda m: torch.cat([m["G"](fixed_noise), m["D"](test)], 1))
    else:
        run.check(netG, sessions[0], generator(), lambda m: m(fixed_noise))
        run.check(netD, sessions[1], discriminator(), lambda m: m(test))


# 3. Deep Q-learning with replay and a target network. The world is small enough for its true Q to be known.


class Grid:
    """A room of 6 × 6 in which the floor is slippery; reaching the corner pays 1, and the agent starts anywhere."""

    SIDE, DISCOUNT, SLIP = 6, 0.9, 0.2

    def __init__(self) -> None:
        side = self.SIDE
        row, column = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
        self.observations = torch.cat([F.one_hot(row, side), F.one_hot(column, side)], 1).float()
        moves = ((-1, 0), (1, 0), (0, -1), (0, 1))
        self.next = torch.stack(
            [(row + r).clamp(0, side - 1) * side + (column + c).clamp(0, side - 1) for r, c in moves], 1
        )
        self.goal = side * side - 1

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slips = torch.rand(len(state)) < self.SLIP
        action = torch.where(slips, torch.randint(4, action.shape), action)
        reached = self.next[state, action]
        done = (reached == self.goal).float()
        return (
            torch.where(reached == self.goal, torch.randint(self.goal, state.shape), reached),
            done,
            reached,
        )

    def values(self) -> Tensor:
        """Q*, by value iteration."""
        q = torch.zeros(self.goal + 1, 4)
        for _ in range(200):
            best = torch.where(self.next == self.goal, 1.0, self.DISCOUNT * q.max(1).values[self.next])
            q = (1 - self.SLIP) * best + self.SLIP * best.mean(1, keepdim=True)
        return q


def q_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def dqn(run: Run, *, polyak: bool = False) -> None:
    env = Grid()
    states = env.observations[: env.goal]
    test_s, test_a = torch.randint(env.goal, (512,)), torch.randint(4, (512,))
    _, test_d, test_s2 = env.step(test_s, test_a)
    returns = test_d + (1 - test_d) * env.DISCOUNT * env.values()[test_s2].max(1).values
    policy_net = q_network()
    session = run.attach(policy_net)
    target_net = copy.deepcopy(policy_net)
    optimizer = torch.optim.AdamW(policy_net.parameters(), lr=1e-3, amsgrad=True)
    memory: list[tuple[Tensor, ...]] = []
    state = torch.randint(env.goal, (8,))
    for step in range(run.steps):
        with torch.no_grad():
            greedy = policy_net(env.observations[state]).argmax(1)
        epsilon = 0.1 + 0.9 * math.exp(-step / 300)
        action = torch.where(torch.rand(8) < epsilon, torch.randint(4, (8,)), greedy)
        following, done, reached = env.step(state, action)
        memory.append((state, action, reached, done))
        state = following

        picked = torch.randint(len(memory), (8,)).tolist()
        s, a, s2, d = (torch.cat(column) for column in zip(*(memory[i] for i in picked), strict=True))
        q = policy_net(env.observations[s]).gather(1, a[:, None]).squeeze(1)
        with torch.no_grad():
            best = target_net(env.observations[s2]).max(1).values
        loss = F.smooth_l1_loss(q, d + (1 - d) * env.DISCOUNT * best)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(policy_net.parameters(), 100)
        optimizer.step()
        if polyak:
            theirs, mine = target_net.state_dict(), policy_net.state_dict()
            target_net.load_state_dict({k: 0.02 * mine[k] + 0.98 * theirs[k] for k in mine})
        elif step % 50 == 0:
            target_net.load_state_dict(policy_net.state_dict())
        run.watch(
            step,
            policy_net,
            lambda: F.mse_loss(policy_net(env.observations[test_s])[torch.arange(512), test_a], returns),
        )
    run.check(policy_net, session, q_network(), lambda m: m(states))
    target_net.load_state_dict(policy_net.state_dict())
    run.folded = max(run.folded or 0.0, _difference(policy_net, target_net, lambda m: m(states)))


# 4. Character language model: an LSTM cell written out, truncated backpropagation through time.


class LSTM(nn.Module):
    def __init__(self, letters: int, hidden: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Embedding(letters, 32)
        self.x2h = nn.Linear(32, 4 * hidden)
        self.h2h = nn.Linear(hidden, 4 * hidden)
        self.decoder = nn.Linear(hidden, letters)
        self.hidden = hidden

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = state
        found: list[Tensor] = []
        for inputs in self.encoder(x).unbind(1):
            i, f, g, o = (self.x2h(inputs) + self.h2h(h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            found.append(h)
        return self.decoder(torch.stack(found, 1)), (h, c)

    def init_hidden(self, batch: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(batch, self.hidden), torch.zeros(batch, self.hidden)


def lstm(run: Run) -> None:
    text, letters = corpus()
    batch, bptt = 16, 8
    test_x, test_y = windows(text[-2000:], 32, 64)
    source = text[:-2002][: (len(text) - 2002) // batch * batch].view(batch, -1)
    model = LSTM(letters)
    session = run.attach(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    starts = itertools.cycle(range(0, source.shape[1] - bptt - 1, bptt))
    for step, start in zip(range(run.steps), starts, strict=False):
        if start == 0:
            state = model.init_hidden(batch)
        state = tuple(part.detach() for part in state)
        logits, state = model(source[:, start : start + bptt], state)
        loss = F.cross_entropy(logits.flatten(0, 1), source[:, start + 1 : start + bptt + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        run.watch(
            step,
            model,
            lambda: F.cross_entropy(model(test_x, model.init_hidden(64))[0].flatten(0, 1), test_y.flatten()),
        )
    run.check(model, session, LSTM(letters), lambda m: m(test_x, m.init_hidden(64))[0])


# 5. U-Net: discs in noise.


class DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            *(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True)),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True)),
        )


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inc, self.down1, self.down2 = DoubleConv(1, 4), DoubleConv(4, 8), DoubleConv(8, 16)
        self.up1, self.conv1 = nn.ConvTranspose2d(16, 8, 2, stride=2), DoubleConv(16, 8)
        self.up2, self.conv2 = nn.ConvTranspose2d(8, 4, 2, stride=2), DoubleConv(8, 4)
        self.outc = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(F.max_pool2d(x1, 2))
        x3 = self.down2(F.max_pool2d(x2, 2))
        x = self.conv1(torch.cat([x2, self.up1(x3)], 1))
        return self.outc(self.conv2(torch.cat([x1, self.up2(x)], 1)))


def discs(count: int, side: int = 16) -> tuple[Tensor, Tensor]:
    """Noisy pictures with a disc in each, and the discs' masks."""
    centre, radius = 3 + torch.rand(count, 2, 1, 1) * (side - 6), 2 + 3 * torch.rand(count, 1, 1)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    mask = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < radius**2).float()[:, None]
    return mask + torch.randn_like(mask), mask


def unet(run: Run) -> None:
    test_x, test_y = discs(64)
    model = UNet()
    session = run.attach(model)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, weight_decay=1e-8, momentum=0.9)
    criterion = nn.BCEWithLogitsLoss()
    for step in range(run.steps):
        images, masks = discs(4)
        loss = criterion(model(images), masks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.watch(step, model, lambda: criterion(model(test_x), test_y))
    run.check(model, session, UNet(), lambda m: m(test_x))


# 6. Vision transformer.


class ViT(nn.Module):
    def __init__(self, dim: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, kernel_size=2, stride=2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 17, dim))
        block = nn.TransformerEncoderLayer(
            dim,
            nhead=4,
            dim_feedforward=2 * dim,
            dropout=0.1,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit(run: Run) -> None:
    images = digits()
    test_x, test_y = images.test.inputs[:256], images.test.targets[:256]
    test_x = test_x + torch.randn_like(test_x)
    model = ViT()
    session = run.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=run.steps)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    train = loader(images.train.inputs, images.train.targets, batch_size=8)
    for step, (x, y) in zip(range(run.steps), train, strict=False):
        loss = criterion(model(x + torch.randn_like(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        run.watch(step, model, lambda: criterion(model(test_x), test_y))
    run.check(model, session, ViT(), lambda m: m(test_x))


# 7. GPT, its head tied to its embedding.


class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.heads = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = (
            nn.LayerNorm(dim),
            CausalSelfAttention(dim, heads),
            nn.LayerNorm(dim),
        )
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, letters: int, block_size: int = 16, dim: int = 32) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(letters, dim), nn.Embedding(block_size, dim)
        self.h = nn.Sequential(Block(dim, 2), Block(dim, 2))
        self.ln_f, self.lm_head = nn.LayerNorm(dim), nn.Linear(dim, letters, bias=False)
        self.lm_head.weight = self.wte.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        return self.lm_head(self.ln_f(self.h(x)))


def gpt(run: Run) -> None:
    text, letters = corpus()
    test_x, test_y = windows(text[-2000:], 16, 64)
    model = GPT(letters)
    session = run.attach(model)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    warmup = max(1, run.steps // 20)

    def rate(step: int) -> float:
        share = (step - warmup) / max(1, run.steps - warmup)
        return (step + 1) / (warmup + 1) if step < warmup else 0.1 + 0.45 * (1 + math.cos(math.pi * share))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    for step in range(run.steps):
        loss_of(*windows(text[:-2000], 16, 8)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        run.watch(step, model, lambda: loss_of(test_x, test_y))
    run.check(model, session, GPT(letters), lambda m: m(test_x))


# 8. Siamese network, contrastive loss: one network, called twice in each step.


def embedder() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)),
    )


def pairs(split: data.Split, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy pictures, half of them of the same digit."""
    first = torch.randint(len(split), (count,))
    same = split.targets[first][:, None] == split.targets
    wanted = torch.where(torch.rand(count, 1) < 0.5, same, ~same).float()
    second = torch.multinomial(wanted, 1).squeeze(1)
    x1, x2 = (split.inputs[rows] + torch.randn(count, *split.inputs.shape[1:]) for rows in (first, second))
    return x1, x2, (split.targets[first] != split.targets[second]).float()


def siamese(run: Run) -> None:
    images = digits()
    test = pairs(images.test, 256)
    model = embedder()
    session = run.attach(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def contrastive_loss(x1: Tensor, x2: Tensor, different: Tensor) -> Tensor:
        distance = F.pairwise_distance(model(x1), model(x2))
        return torch.mean((1 - different) * distance**2 + different * F.relu(1 - distance) ** 2)

    for step in range(run.steps):
        optimizer.zero_grad()
        contrastive_loss(*pairs(images.train, 16)).backward()
        optimizer.step()
        run.watch(step, model, lambda: contrastive_loss(*test))
    run.check(model, session, embedder(), lambda m: m(test[0]))


# 9. A Lightning module: a denoising autoencoder.


def lightning(run: Run) -> None:
    import lightning as L

    images = digits()
    test = images.test.inputs[:256]

    class LitAutoEncoder(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())
            self.bottleneck = nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 256), nn.ReLU())
            self.decoder = nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.bottleneck(self.encoder(x)).view(-1, 16, 4, 4))

        def loss(self, x: Tensor) -> Tensor:
            return F.mse_loss(self(x + torch.randn_like(x)), x)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.loss(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
            run.watch(trainer.global_step - 1, module, lambda: module.loss(test))

    def trainer() -> L.Trainer:
        return L.Trainer(
            **{
                "max_steps": run.steps,
                "max_epochs": -1,
                "accelerator": "cpu",
                "default_root_dir": run.folder,
            },
            **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
            enable_model_summary=False,
            callbacks=[Watch()],
        )

    rows = torch.utils.data.TensorDataset(images.train.inputs)
    train = torch.utils.data.DataLoader(rows, 32, shuffle=True)
    model = LitAutoEncoder()
    session = run.attach(model)
    fitted = trainer()
    fitted.fit(model, train)
    fitted.save_checkpoint(file := run.folder / "last.ckpt")
    # At its last step already, a run from the checkpoint ends as soon as it has loaded it.
    run.check(
        *(model, session, LitAutoEncoder(), lambda m: m(test)),
        reload=lambda fresh: trainer().fit(fresh, train, ckpt_path=file),
    )


# 10. A `Trainer` of transformers: does one kind of word outnumber another? A tenth of the labels are wrong.


def trainer(run: Run) -> None:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    def sentences(count: int) -> list[dict[str, Tensor]]:
        words = torch.randint(1, 32, (count, 16))
        labels = (words < 8).sum(1) > ((words >= 8) & (words < 16)).sum(1)
        labels = (labels ^ (torch.rand(count) < 0.1)).long()
        return [{"input_ids": x, "labels": y} for x, y in zip(words, labels, strict=True)]

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            run.watch(state.global_step - 1, kwargs["model"], lambda: kwargs["model"](**test).loss)

    config = BertConfig(
        **{"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 64, "max_position_embeddings": 16},
    )
    args = TrainingArguments(
        **{
            "output_dir": str(run.folder),
            "max_steps": run.steps,
            "save_steps": run.steps,
            "learning_rate": 1e-3,
        },
        **{"per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True, "report_to": "none"},
        **{"logging_strategy": "no", "dataloader_pin_memory": False, "seed": torch.initial_seed()},
    )
    train, rows = sentences(10_000), sentences(512)
    test = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def fit(model: nn.Module, *, resume: bool = False) -> None:
        # Resumed where it had ended it makes one step more, by the schedule's end at a rate of 0.
        callbacks = [] if resume else [Watch()]
        Trainer(model, args, train_dataset=train, callbacks=callbacks).train(resume_from_checkpoint=resume)

    model = BertForSequenceClassification(config)
    session = run.attach(model)
    fit(model)

    def reload(fresh: nn.Module) -> None:
        if session is not None:
            rg.session_of(fresh).load_state_dict(session.state_dict())
        fit(fresh, resume=True)

    run.check(
        *(
            model,
            session,
            BertForSequenceClassification(config),
            lambda m: m(input_ids=test["input_ids"]).logits,
        ),
        reload=reload,
    )


SCRIPTS: dict[str, Callable[[Run], None]] = {
    "vae": vae,
    "gan": gan,
    "gan-one-session": functools.partial(gan, together=True),
    "dqn": dqn,
    "dqn-polyak": functools.partial(dqn, polyak=True),
    "lstm": lstm,
    "unet": unet,
    "vit": vit,
    "gpt": gpt,
    "siamese": siamese,
    "lightning": lightning,
    "trainer": trainer,
}
NEEDS = {"lightning": ("lightning",), "trainer": ("transformers", "accelerate")}


def missing(script: str) -> str | None:
    """The package that a script needs and that is not installed."""
    return next((name for name in NEEDS.get(script, ()) if find_spec(name) is None), None)


def train(script: str, method: Method | None, steps: int, seed: int) -> Run:
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(method, steps, Path(folder))
        SCRIPTS[script](run)
    return run


# The table.


def main() -> None:
    parser = arguments(__doc__, "public-scripts.json")
    parser.add_argument("--scripts", nargs="+", choices=[*SCRIPTS], default=[*SCRIPTS])
    parser.add_argument("--methods", nargs="+", choices=["plain", *METHODS], default=["plain", *METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the methods")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=Path, default=ROWS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    given.rows.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.rows.exists() else []
    for script, name in itertools.product(given.scripts, dict.fromkeys(["plain", *given.methods])):
        seeds = {*PLAIN_SEEDS, *given.seeds} if name == "plain" else given.seeds
        if package := missing(script):
            print(f"{script}: left out, {package} is not installed", flush=True)
            continue
        for seed in sorted(seeds):
            key = {"script": script, "method": name, "seed": seed, "steps": given.steps}
            if not any(key.items() <= row.items() for row in done):
                done.append(_row(key))
                print(done[-1], flush=True)
                with given.rows.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    rows = [row for row in done if row["steps"] == given.steps]
    what = f"{given.steps} steps of training scripts in their public form, plain and with each method"
    files.write_json(given.out, {**head(what), "summary": _summary(rows), "rows": rows})


def _row(key: dict[str, Any]) -> dict[str, Any]:
    method = METHODS.get(key["method"])
    start = time.perf_counter()
    run = train(key["script"], method, key["steps"], key["seed"])
    loss = sum(run.losses) / len(run.losses)
    return {
        **key,
        "settings": repr(method) if method else "",
        "loss": loss if math.isfinite(loss) else None,
        "finite": run.finite and math.isfinite(loss),
        "checkpoint": run.checkpoint,
        "fold": run.folded if method else None,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each script and method.

    `ratio`: of the loss to plain backpropagation's from the same seed, mean over the seeds; None where one is not
    finite. `chance`: the largest loss of plain backpropagation over the least, of all its seeds.
    """
    losses = {(row["script"], row["method"], row["seed"]): row["loss"] for row in rows}
    found: list[dict[str, Any]] = []
    for script, name in dict.fromkeys((row["script"], row["method"]) for row in rows):
        runs = [row for row in rows if (row["script"], row["method"]) == (script, name)]
        pairs = [(row["loss"], losses[script, "plain", row["seed"]]) for row in runs]
        finite = all(row["finite"] for row in runs)
        ratios = [loss / base for loss, base in pairs if base] if finite else []
        ratio = sum(ratios) / len(ratios) if ratios else None
        plain = [loss for key, loss in losses.items() if key[:2] == (script, "plain") and loss]
        same = all(max(row["checkpoint"], row["fold"] or 0.0) <= TOLERANCE for row in runs)
        found.append(
            {
                **{"script": script, "method": name, "ratio": ratio, "ratios": ratios},
                "chance": max(plain) / min(plain) if len(plain) > 1 else None,
                **{"finite": finite, "same": same},
                "passed": ratio is not None and ratio <= ALLOWED and same,
            }
        )
    return found


if __name__ == "__main__":
    main()
