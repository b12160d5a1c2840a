import copy
import io
import sys

import pytest
import torch
from torch import nn

from retrograde.errors import MissingPackageError, OptionError
from retrograde.lab import peers

RATE = 0.01
ALL = ["asam", "galore", "mud", "muon", "psgd", "sam", "schedule-free", "shampoo", "soap"]
OPTIONS = {
    "galore": {"rank": 3, "interval": 2},
    "shampoo": {"interval": 2, "start": 2},
    "soap": {"interval": 2},
}


@pytest.fixture(autouse=True)
def packages():
    pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed")
    pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    pytest.importorskip("opt_einsum", reason="opt-einsum is not installed")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
    )


def base(parameters):
    return torch.optim.SGD(parameters, RATE, momentum=0.9, fused=True)


def make(name, model, options=None, decay=0.0, rate=RATE):
    return peers.make(name, options or {}).make_optimizer(model, rate, decay, base)


def take_step(optimizer, model, seed, second_pass):
    torch.manual_seed(seed)
    x, y = torch.randn(16, 1, 6, 6), torch.randint(0, 3, (16,))

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    loss = closure()
    optimizer.step(closure) if second_pass else optimizer.step()
    return loss.item()


def matrix_step(name, gradients, options=None, **settings):
    """The weight of one hidden matrix, of which the model's head is no part, after steps with these gradients."""
    model = nn.Sequential(nn.Linear(*reversed(gradients[0].shape), bias=False), nn.Linear(2, 2, bias=False))
    nn.init.zeros_(model[0].weight)
    optimizer = make(name, model, options, **settings)
    for g in gradients:
        model[0].weight.grad = g.clone()
        optimizer.step()
    return model[0].weight.detach()


@pytest.mark.parametrize("name", ALL)
def test_resumes_to_the_bit_from_a_plain_checkpoint(name):
    def begin():
        model = network()
        optimizer = make(name, model, OPTIONS.get(name), decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=8, cycle_momentum=False)
        return model, optimizer, schedule

    def run(model, optimizer, schedule, seeds):
        for seed in seeds:
            take_step(optimizer, model, seed, peers.find(name).second_pass)
            schedule.step()

    whole = begin()
    run(*whole, range(5))
    first = begin()
    run(*first, range(3))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = begin()
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(*second, range(3, 5))
    run(*first, range(3, 5))  # Saving has not disturbed it.
    for key, value in whole[0].state_dict().items():
        assert torch.equal(second[0].state_dict()[key], value), key
        assert torch.equal(first[0].state_dict()[key], value), key


@pytest.mark.parametrize("name", ALL)
def test_schedule_moves_every_group_and_the_step(name):
    def moved(rate):
        model = network()
        optimizer = make(name, model, OPTIONS.get(name))
        assert isinstance(optimizer, torch.optim.Optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate)
        for seed in range(3):
            take_step(optimizer, model, seed, peers.find(name).second_pass)
            schedule.step()
        assert all(group["lr"] == group["initial_lr"] * rate for group in optimizer.param_groups)
        assert optimizer.param_groups[0]["initial_lr"] == RATE
        return [
            (p - q).detach().norm() for p, q in zip(model.parameters(), network().parameters(), strict=True)
        ]

    assert all(norm == 0 for norm in moved(0.0))
    assert all(norm > 0 for norm in moved(1.0)[4:])


@pytest.mark.parametrize("name", ALL)
def test_learns(name):
    model = network()
    optimizer = make(name, model, OPTIONS.get(name))
    losses = [take_step(optimizer, model, 0, peers.find(name).second_pass) for _ in range(25)]
    assert losses[-1] < 0.8 * losses[0]


def test_muon_update_is_near_orthogonal_and_torchs_own():
    torch.manual_seed(0)
    gradients = [torch.randn(2, 12), torch.randn(2, 12)]
    ours = matrix_step("muon", gradients, decay=0.1)
    singular = torch.linalg.svdvals(matrix_step("muon", gradients[:1]) / RATE)
    assert ((singular > 0.6) & (singular < 1.3)).all()
    theirs = nn.Parameter(torch.zeros(2, 12))
    optimizer = torch.optim.Muon([theirs], RATE, weight_decay=0.1)
    for g in gradients:
        theirs.grad = g.clone()
        optimizer.step()
    # The iteration runs in bfloat16 in torch's.
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=0.03 * RATE)


@pytest.mark.parametrize("shape", [(3, 12), (12, 3), (5, 5)])
def test_mud_solves_the_lower_triangle_of_the_rows_gram_matrix(shape):
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    ours = matrix_step("mud", [gradient])
    tall = shape[0] > shape[1]
    rows = (gradient.mT if tall else gradient).double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    q = torch.linalg.inv((rows @ rows.mT).tril()) @ rows
    q = q / q.norm(dim=1, keepdim=True)
    expected = -RATE * 0.2 * max(shape) ** 0.5 * (q.mT if tall else q)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)


def test_mud_leaves_rows_of_zeros_at_zero():
    gradient = torch.randn(4, 6)
    gradient[2] = 0
    step = matrix_step("mud", [gradient])
    assert step.isfinite().all()
    assert (step[2] == 0).all()
    assert (step[[0, 1, 3]].norm(dim=1) > 0).all()


def test_muon_flattens_convolutions_and_leaves_head_and_vectors_to_adam():
    model = network()
    before = copy.deepcopy(model)
    optimizer = make("muon", model, {"adam_learning_rate": 1e-3})
    hidden, rest = (group["params"] for group in optimizer.param_groups)
    assert {id(p) for p in hidden} == {id(model[0].weight), id(model[4].weight)}
    assert len(rest) == len(list(model.parameters())) - 2
    take_step(optimizer, model, 0, False)
    singular = torch.linalg.svdvals((model[0].weight - before[0].weight).detach().reshape(4, 9) / RATE)
    assert ((singular > 0.5) & (singular < 1.3)).all()
    # Adam's first step is its learning rate times the gradient's sign.
    step = (model[6].weight - before[6].weight).detach().abs()
    torch.testing.assert_close(step, torch.full_like(step, 1e-3), rtol=1e-3, atol=0)


def test_muon_leaves_tied_embeddings_to_adam():
    from retrograde.lab.peers.optimizers import hidden_weights

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.hidden, self.out = (
                nn.Embedding(5, 4),
                nn.Linear(4, 4),
                nn.Linear(4, 5, bias=False),
            )
            self.out.weight = self.embedding.weight

    model = Tied()
    assert [id(p) for p in hidden_weights(model)] == [id(model.hidden.weight)]


def adam(gradients, beta1, beta2, eps=1e-8):
    p = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = torch.optim.Adam([p], RATE, betas=(beta1, beta2), eps=eps)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def test_soap_in_an_axis_aligned_basis_is_adam():
    # G Gᵀ and Gᵀ G of diagonal gradients are diagonal, so the eigenbases are signed axes. The first step is none.
    torch.manual_seed(0)
    gradients = [torch.diag(torch.tensor([3.0, 2.0]) * (1 + 0.2 * torch.rand(2))) for _ in range(4)]
    ours = matrix_step("soap", gradients, {"interval": 100})
    theirs = adam(gradients[1:], 0.95, 0.95)
    torch.testing.assert_close(ours.diag(), theirs.diag(), rtol=1e-4, atol=1e-7)


def test_soap_first_update_is_adams_in_the_eigenbasis():
    # Statistics of G₁ = U S Vᵀ alone: the update is U · sign(Uᵀ G₂ V) · Vᵀ, with Adam's first step as the sign.
    torch.manual_seed(0)
    first, second = torch.randn(2, 2, 2)
    u, _, vh = torch.linalg.svd(first)
    expected = -RATE * u @ (u.T @ second @ vh.T).sign() @ vh
    torch.testing.assert_close(matrix_step("soap", [first, second]), expected, rtol=1e-3, atol=1e-5)


def test_shampoo_first_update_is_orthogonal():
    # (G Gᵀ)^(-1/4) G (Gᵀ G)^(-1/4) = U Vᵀ; statistics have weight 1 − β₂, and the step the momentum's factor.
    torch.manual_seed(0)
    g = 10 * torch.randn(2, 2)
    u, _, vh = torch.linalg.svd(g)
    options = {"graft": "none", "interval": 1, "start": 1, "beta2": 0.75, "beta1": 0.0, "block": 2}
    update = matrix_step("shampoo", [g], options)
    torch.testing.assert_close(update, -RATE * 2 * u @ vh, rtol=1e-3, atol=1e-5)


def test_shampoo_grafts_the_size():
    torch.manual_seed(0)
    g = torch.randn(2, 2)
    options = {"graft": "sgd", "interval": 1, "start": 1, "beta1": 0.0, "block": 2}
    update = matrix_step("shampoo", [g], options)
    torch.testing.assert_close(update.norm(), RATE * g.norm())
    assert torch.nn.functional.cosine_similarity(update.flatten(), -g.flatten(), dim=0) < 0.99
    with pytest.raises(OptionError, match="'adam'"):
        peers.make("shampoo", {"graft": "adam"})


def test_psgd_whitens():
    # P → E[g gᵀ]^(-1/2): gradients of very different scales get updates of one size.
    torch.manual_seed(0)
    scales = torch.tensor([[1.0], [30.0]])
    model = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = make("psgd", model, {"momentum": 0.0})
    updates = []
    for _ in range(400):
        old = model.weight.detach().clone()
        model.weight.grad = scales * torch.randn(2, 3)
        optimizer.step()
        updates.append((model.weight.detach() - old) / RATE)
    sizes = torch.stack(updates[-150:]).square().mean((0, 2)).sqrt()
    assert sizes[1] / sizes[0] < 2
    assert (sizes > 0.4).all()


def test_psgd_never_forms_the_product_of_its_factors():
    # 1024² · 512² entries would be a terabyte.
    model = nn.Linear(1024, 512, bias=False)
    optimizer = make("psgd", model)
    model.weight.grad = torch.randn(512, 1024)
    optimizer.step()


def test_galore_of_full_rank_first_step_is_adam_in_the_singular_basis():
    # G = U S Vᵀ tall: R = G V = U S, Adam's first step is sign(U S), and it is projected back by Vᵀ.
    torch.manual_seed(0)
    g = torch.randn(6, 2)
    update = matrix_step("galore", [g], {"rank": 2, "scale": 0.5})
    _, _, vh = torch.linalg.svd(g, full_matrices=False)
    torch.testing.assert_close(update, -0.5 * RATE * (g @ vh.T).sign() @ vh, rtol=1e-3, atol=1e-6)


def test_galore_of_full_rank_is_adam_up_to_its_scale_where_the_basis_is_the_axes():
    torch.manual_seed(0)
    gradients = [torch.diag(torch.tensor([3.0, 2.0]) + 0.3 * torch.rand(2)) for _ in range(4)]
    ours = matrix_step("galore", gradients, {"rank": 2, "scale": 0.5})
    torch.testing.assert_close(ours, 0.5 * adam(gradients, 0.9, 0.999), rtol=1e-3, atol=1e-6)


def test_galore_update_has_the_rank():
    torch.manual_seed(0)
    update = matrix_step("galore", [torch.randn(8, 6)], {"rank": 2})
    assert torch.linalg.matrix_rank(update, atol=1e-6) == 2


@pytest.mark.parametrize("name", ["sam", "asam"])
def test_sam_steps_with_the_gradient_nearby(name):
    # L(w) = ½ wᵀ A w: g = A w, and the step is A (w + e) with e = ρ g/‖g‖, or ρ w²⊙g/‖w⊙g‖ for ASAM.
    a = torch.tensor([[3.0, 0.5], [0.5, 1.0]])
    model = nn.Linear(2, 1, bias=False)
    w = model.weight.detach().clone()
    g = w @ a
    e = g / g.norm() if name == "sam" else w**2 * g / (w * g).norm()
    rho = 0.2
    optimizer = make(name, model, {"rho": rho})

    def closure():
        optimizer.zero_grad()
        loss = (model.weight @ a @ model.weight.T).sum() / 2
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)
    torch.testing.assert_close(model.weight.detach(), w - RATE * (w + rho * e) @ a)
    assert not torch.allclose(model.weight.detach(), w - RATE * g, atol=1e-4)


def test_schedule_free_follows_the_models_mode():
    model = network()
    optimizer = make("schedule-free", model)
    for seed in range(4):
        take_step(optimizer, model, seed, False)
    training = model[4].weight.detach().clone()
    averaged = (training - 0.1 * optimizer.state[model[4].weight]["z"]) / 0.9  # y = 0.9 x + 0.1 z
    model.eval()(torch.randn(2, 1, 6, 6))
    torch.testing.assert_close(model[4].weight.detach(), averaged)
    assert not torch.equal(averaged, training)
    other = copy.deepcopy(model).train()
    other(torch.randn(2, 1, 6, 6))
    torch.testing.assert_close(model[4].weight.detach(), averaged)
    model.train()(torch.randn(2, 1, 6, 6))
    torch.testing.assert_close(model[4].weight.detach(), training)
    peers.make("schedule-free").finish(model)
    torch.testing.assert_close(model[4].weight.detach(), averaged)
    model.train()(torch.randn(2, 1, 6, 6))
    torch.testing.assert_close(model[4].weight.detach(), averaged)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(MissingPackageError, match=r"pytorch-optimizer.*retrograde\[peers\]"):
        make("soap", network())
