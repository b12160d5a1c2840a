import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from retrograde.errors import NoEffectError, OptionError, PatternError, RetrogradeWarning, StateError
from retrograde.spectral import maml, meta

RATE, STEPS, RANK = 0.3, 2, 5


def network():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, 1, padding="same", groups=2),
        nn.Flatten(),
        nn.Linear(96, 12),
        nn.LayerNorm(12),
        nn.ReLU(),
        nn.Linear(12, 3),
    ).double()


def batch(tasks=3, rows=6, queries=4, shape=(1, 8, 8), dtype=torch.float64):
    def pair(n):
        return torch.randn(tasks, n, *shape, dtype=dtype), torch.randint(3, (tasks, n))

    return *pair(rows), *pair(queries)


def reference(model, tasks, projectors=None, *, only=None, first_order=False):
    """MAML by plain autograd, P multiplied to gradients already formed."""
    theta = dict(model.named_parameters())
    losses = []
    for x, y, query, target in zip(*tasks, strict=True):
        moved = dict(theta)
        for _ in range(STEPS):
            loss = F.cross_entropy(functional_call(model, moved, (x,)), y)
            slopes = torch.autograd.grad(loss, list(moved.values()), create_graph=not first_order)
            for (name, value), slope in zip(list(moved.items()), slopes, strict=True):
                if only is not None and name not in only:
                    continue
                p = (projectors or {}).get(name)
                grouped = slope if p is None else slope.unflatten(0, (p.shape[0], -1)).flatten(2)
                moved[name] = value - RATE * (slope if p is None else (grouped @ p).view_as(slope))
        losses.append(F.cross_entropy(functional_call(model, moved, (query,)), target))
    return torch.stack(losses).mean()


def projectors(learner):
    bases = {name: subspace["basis"] for name, subspace in learner.get_extra_state()["subspaces"].items()}
    return {f"{name}.weight": u @ u.mT for name, u in bases.items()}


def assert_same_gradients(model, loss, expected, other):
    torch.testing.assert_close(loss, expected)
    pairs = zip(
        torch.autograd.grad(loss, list(model.parameters())),
        torch.autograd.grad(expected, list(other.parameters())),
        strict=True,
    )
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("vectorise", [True, False])
@pytest.mark.parametrize("options", [{}, {"first_order": True}, {"only": "8"}], ids=["maml", "first", "anil"])
def test_without_rank_it_is_maml(options, vectorise):
    model, tasks = network(), batch()
    other = copy.deepcopy(model)
    learner = maml(model, STEPS, RATE, rank=None, vectorise=vectorise, **options)
    if "only" in options:
        options = {"only": ["8.weight", "8.bias"]}
    assert_same_gradients(model, learner.loss(*tasks), reference(other, tasks, **options), other)


@pytest.mark.parametrize("few", [0, 1e9], ids=["merged", "narrow"])
@pytest.mark.parametrize("vectorise", [True, False])
@pytest.mark.parametrize("first_order", [False, True])
def test_projected_steps_are_maml_with_projected_gradients(monkeypatch, few, vectorise, first_order):
    monkeypatch.setattr(meta, "_FEW", few)
    model, tasks = network(), batch()
    other = copy.deepcopy(model)
    learner = maml(model, STEPS, RATE, RANK, vectorise=vectorise, first_order=first_order, skip_head=False)
    loss = learner.loss(*tasks)
    assert learner.projected == dict.fromkeys("0358", RANK)
    expected = reference(other, tasks, projectors(learner), first_order=first_order)
    assert_same_gradients(model, loss, expected, other)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(6),
        nn.LayerNorm(7),
        nn.InstanceNorm1d(6, affine=True),
        nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
        nn.GroupNorm(2, 6),
        nn.RMSNorm(7),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_second_derivatives_of_normalisations_are_right_under_vmap(norm):
    model = nn.Sequential(nn.Conv1d(2, 6, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(42, 3)).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    tasks = batch(shape=(2, 8))
    other = copy.deepcopy(model)
    assert_same_gradients(model, maml(model, STEPS, RATE, None).loss(*tasks), reference(other, tasks), other)


def test_the_tracked_basis_leads_the_second_moment_of_the_support_sets():
    model = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    tasks = batch(shape=(8,))
    learner = maml(model, rank=4, every=2)
    learner.loss(*tasks)
    rows = tasks[0].flatten(0, 1)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    expected = vectors[:, -4:] @ vectors[:, -4:].T
    assert list(learner.projected) == ["0"]
    torch.testing.assert_close(projectors(learner)["0.weight"][0], expected)
    assert learner.energy["0"] == pytest.approx(float(values[-4:].sum() / values.sum()))
    before = projectors(learner)["0.weight"]
    other = batch(shape=(8,))
    learner.loss(*other)
    assert torch.equal(projectors(learner)["0.weight"], before)
    learner.eval().loss(*other)
    assert torch.equal(projectors(learner)["0.weight"], before)
    learner.train().loss(*other)
    assert not torch.equal(projectors(learner)["0.weight"], before)


def test_a_basis_of_the_task_that_spans_its_rows_loses_nothing():
    # G = DᵀX lies in the span of X's rows: 4 rows, rank 4. Of the head, X depends on θ and the basis is a constant.
    model = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    tasks = batch(rows=4, shape=(8,))
    other = copy.deepcopy(model)
    learner = maml(model, 1, RATE, 4, basis="task")
    plain = maml(other, 1, RATE, None)
    assert_same_gradients(model, learner.loss(*tasks), plain.loss(*tasks), other)
    both = maml(model, 1, RATE, 4, basis="task", skip_head=False)
    torch.testing.assert_close(both.loss(*tasks), plain.loss(*tasks))
    tracked = maml(other, 1, RATE, 4)
    assert (tracked.loss(*tasks) - plain.loss(*tasks)).abs() > 1e-4


def test_a_random_basis_is_drawn_once():
    model = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    learner = maml(model, STEPS, RATE, 4, basis="random", every=1)
    other = copy.deepcopy(model)
    tasks = batch(shape=(8,))
    loss = learner.loss(*tasks)
    first = projectors(learner)
    torch.testing.assert_close(first["0.weight"] @ first["0.weight"], first["0.weight"])
    assert_same_gradients(model, loss, reference(other, tasks, first), other)
    learner.loss(*batch(shape=(8,)))
    assert torch.equal(projectors(learner)["0.weight"], first["0.weight"])
    tracked = maml(model, STEPS, RATE, 4)
    tracked.loss(*tasks)
    assert not torch.allclose(projectors(tracked)["0.weight"], first["0.weight"], atol=0.1)


@pytest.mark.parametrize("rank", [None, RANK])
@pytest.mark.parametrize("basis", ["tracked", "task", "random"])
def test_adapt_gives_a_module_of_its_own(rank, basis):
    model, (x, y, query, _) = network(), batch()
    learner = maml(model, STEPS, RATE, rank, basis=basis)
    before = copy.deepcopy(model.state_dict())
    outputs = learner.eval()(x, y, query)
    for training in (True, False):
        adapted = learner.adapt(x[1], y[1]).train(training)
        torch.testing.assert_close(adapted(query[1]), outputs[1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.equal(adapted[0].weight, model[0].weight)
    assert "forward" not in model[0].__dict__
    assert model[1].track_running_stats


@pytest.mark.parametrize("vectorise", [True, False])
def test_running_statistics_are_not_written_and_read_only_on_demand(vectorise):
    model, tasks = network(), batch()
    model[1].running_mean += 1
    before = copy.deepcopy(model[1].state_dict())
    own = maml(model, 1, RATE, RANK, vectorise=vectorise).loss(*tasks)
    learner = maml(model, 1, RATE, RANK, vectorise=vectorise, batch_statistics=False)
    running = learner.loss(*tasks)
    running.backward()
    assert all(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())
    assert (own - running).abs() > 1e-3
    adapted = learner.adapt(tasks[0][0], tasks[1][0]).eval()
    outputs = learner.eval()(*(one[:1] for one in tasks[:3]))
    torch.testing.assert_close(adapted(tasks[2][0]), outputs[0])


@pytest.mark.parametrize("training", [True, False])
def test_an_adapted_module_reads_the_stored_statistics_in_either_mode(training):
    """As the learner does, and writes none; a copy of it and a pickle too."""
    model, (x, y, query, _) = network(), batch()
    model[1].running_mean += 1
    learner = maml(model.train(), STEPS, RATE, RANK, batch_statistics=False)
    outputs = learner.eval()(x, y, query)
    model.train()
    adapted = learner.adapt(x[1], y[1]).train(training)
    before = copy.deepcopy(adapted.state_dict())
    for one in (adapted, copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        torch.testing.assert_close(one(query[1]), outputs[1])
        assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


def test_norms_that_store_nothing_go_by_their_batch():
    model, tasks = network(), batch()
    model[1] = nn.BatchNorm2d(6, track_running_stats=False).double()
    losses = [maml(model, 1, RATE, RANK, batch_statistics=one).loss(*tasks) for one in (True, False)]
    assert torch.equal(*losses)


def test_frozen_shared_and_tied_layers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 6)
            self.twice = nn.Linear(6, 6)
            self.frozen = nn.Linear(6, 6).requires_grad_(False)
            self.head = nn.Linear(6, 8, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            h = self.twice(self.twice(self.embed(x)).tanh())
            return self.head(self.frozen(h)).mean(1)

    model = Tied().double()
    x, y = torch.randint(8, (3, 4, 5)), torch.randint(8, (3, 4))
    other = copy.deepcopy(model)
    learner = maml(model, STEPS, RATE, 3)
    loss = learner.loss(x, y, x, y)
    assert learner.projected == {"twice": 3}
    assert not any(name.startswith("frozen") for name in learner.adapted)
    frozen = other.frozen.requires_grad_(True)
    only = [name for name, _ in other.named_parameters() if not name.startswith("frozen")]
    expected = reference(other, (x, y, x, y), projectors(learner), only=only)
    frozen.requires_grad_(False)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.frozen.weight.grad is None
    assert not torch.equal(model.twice.weight.grad, torch.zeros(6, 6))


def test_a_forward_pass_that_was_replaced_stays():
    model = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 9), nn.Linear(9, 3)).double()
    replaced = model[0].forward = lambda x: F.linear(x, model[0].weight, model[0].bias).tanh()
    tasks = batch(shape=(8,))
    learner = maml(model, STEPS, RATE, 4)
    loss = learner.loss(*tasks)
    assert learner.projected == {"1": 4}
    assert model[0].forward is replaced
    other = nn.Sequential(model[0], copy.deepcopy(model[1]), copy.deepcopy(model[2]))
    torch.testing.assert_close(loss, reference(other, tasks, projectors(learner)))


def test_tasks_of_different_sizes_and_of_one_row():
    model = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 3))
    sets = [batch(1, rows, 2, (8,), torch.float32) for rows in (1, 3)]
    tasks = [[one[part][0] for one in sets] for part in range(4)]
    learner = maml(model, 1, RATE, 4)
    both = learner.loss(*tasks)
    one_by_one = [learner.eval().loss(*one) for one in sets]
    torch.testing.assert_close(both, torch.stack(one_by_one).mean())


def test_models_that_vmap_refuses_run_task_by_task():
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x if x.sum().item() > 0 else -x)

    model = nn.Sequential(nn.Linear(8, 9), Branching(9, 3)).double()
    tasks = batch(shape=(8,))
    other = copy.deepcopy(model)
    learner = maml(model, STEPS, RATE, None)
    with pytest.warns(RetrogradeWarning, match="Sequential cannot be vectorised over tasks"):
        loss = learner.loss(*tasks)
    assert_same_gradients(model, loss, reference(other, tasks), other)
    learner.loss(*tasks)


def test_an_error_of_the_model_itself_is_the_one_that_is_raised():
    learner = maml(nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 3)).double(), rank=None)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        learner.loss(*batch(shape=(8,)))


def test_attention_and_dropout_have_second_derivatives():
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))
    learner = maml(model, 1, 0.1, 4)
    learner.loss(*batch(shape=(3, 8), dtype=torch.float32)).backward()
    assert list(learner.projected) == ["0.linear1", "0.linear2"]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_state_copies_and_pickles_go_on_as_the_original():
    model, tasks = network(), batch()
    learner = maml(model, 1, RATE, RANK, every=2)
    learner.loss(*tasks)
    stored = io.BytesIO()
    torch.save(learner.state_dict(), stored)
    stored.seek(0)
    resumed = maml(network(), 1, RATE, RANK, every=2)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    followers = [resumed, copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))]
    for _ in range(3):
        tasks = batch()
        loss = learner.loss(*tasks)
        for one in followers:
            assert torch.equal(one.loss(*tasks), loss)
    assert followers[1].model is not model


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": RANK - 1}, r"basis of layer '0' is \(1, 9, 5\), and this learner's is \(1, 9, 4\)"),
        ({"rank": None}, "bases of 0, 3, 5 does not fit a learner that projects none"),
        (
            {"rank": RANK, "skip_head": False},
            "bases of 0, 3, 5 does not fit a learner that projects 0, 3, 5, 8",
        ),
        ({"rank": RANK, "basis": "random"}, "basis='tracked' does not fit a learner with basis='random'"),
    ],
)
def test_the_state_of_another_learner_is_refused_before_it_is_loaded(options, says):
    learner = maml(network(), 1, RATE, RANK)
    learner.loss(*batch())
    other = maml(network(), 1, RATE, **options)
    before = copy.deepcopy(other.model.state_dict())
    with pytest.raises(StateError, match=says):
        other.load_state_dict(learner.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())


@pytest.mark.parametrize("rank", [None, 4])
def test_support_sets_that_nothing_can_be_learnt_from(rank):
    model, (x, y, *query) = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 3)).double(), batch(shape=(8,))
    with pytest.raises(OptionError, match=r"support set of task 0 is empty, \(0, 8\)"):
        maml(model, rank=rank).loss(x[:, :0], y[:, :0], *query)
    with pytest.raises(OptionError, match="support set of task 0 is empty"):
        maml(model, rank=rank).adapt(x[0, :0], y[0, :0])
    if rank:
        x[1, 2, 3] = float("nan")
        with pytest.raises(OptionError, match="input of layer '0' has NaN or infinity on the support sets"):
            maml(model, rank=rank).loss(x, y, *query)
        with pytest.raises(OptionError, match="input of layer '0' has NaN"):
            maml(model, rank=rank).adapt(x[1], y[1])


@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_low_precision(kind):
    model = network().float() if kind == "autocast" else network().bfloat16()
    tasks = batch(dtype=torch.float32 if kind == "autocast" else torch.bfloat16)
    learner = maml(model, 1, 0.1, RANK)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        loss = learner.loss(*tasks)
    loss.backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())
    exact = copy.deepcopy(model).double()
    expected = maml(exact, 1, 0.1, RANK).loss(*(t.double() if t.is_floating_point() else t for t in tasks))
    assert float(loss) == pytest.approx(float(expected), rel=0.05)


def test_meta_training_helps_on_a_loss_of_ones_own():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    learner = maml(model, 1, 0.1, 8, loss=F.mse_loss)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    def sines(tasks):
        phase, x = 6.3 * torch.rand(tasks, 1, 1), 10 * torch.rand(tasks, 20, 1) - 5
        y = (x + phase).sin()
        return x[:, :10], y[:, :10], x[:, 10:], y[:, 10:]

    held_out = sines(50)
    before = float(learner.loss(*held_out))
    for _ in range(150):
        optimizer.zero_grad()
        learner.loss(*sines(8)).backward()
        optimizer.step()
    assert float(learner.eval().loss(*held_out)) < 0.75 * before


def test_refusals():
    model, tasks = network(), batch()
    for options, match in (
        ({"inner_steps": 0}, "inner_steps=0"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 8.5}, "rank=8.5"),
        ({"rank": "a"}, "rank='a'"),
        ({"inner_steps": 1.5}, "inner_steps=1.5"),
        ({"every": True}, "every=True"),
        ({"lr": "x"}, "lr='x'"),
        ({"lr": -0.1}, "lr=-0.1"),
        ({"basis": "best"}, "basis='best'"),
    ):
        with pytest.raises(OptionError, match=match):
            maml(model, **options)
    with pytest.raises(PatternError, match="'haed'"):
        maml(model, only="haed")
    with pytest.raises(NoEffectError, match="rank=96 projects no layer"):
        maml(model, rank=96)
    with pytest.raises(NoEffectError, match="skip_head"):
        maml(nn.Linear(8, 3), rank=4)
    with pytest.raises(NoEffectError, match="frozen"):
        maml(nn.Linear(8, 3).requires_grad_(False), rank=None)
    with pytest.raises(OptionError, match="3 tasks in support_x, 2 in support_y"):
        maml(model, rank=None).loss(tasks[0], tasks[1][:2], *tasks[2:])


def test_a_projected_layer_that_is_never_called_is_an_error():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.used(x))

    with pytest.raises(NoEffectError, match="'unused' is projected"):
        maml(Unused().double(), rank=4).loss(*batch(shape=(8,)))
