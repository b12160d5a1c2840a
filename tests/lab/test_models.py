import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from retrograde.engine.branches import Residual
from retrograde.errors import OptionError
from retrograde.lab.data import Data, Split, batches, load
from retrograde.lab.models import build, names
from retrograde.lab.models.text import masked_mean
from retrograde.lab.models.transformer import SelfAttention


def data(kind: str, shape: tuple[int, ...], classes: int = 5) -> Data:
    generator = torch.Generator().manual_seed(0)
    rows = 4
    if kind in ("text", "language"):
        inputs = torch.randint(1, 30, (rows, *shape), generator=generator)
        vocabulary, classes = 30, 30 if kind == "language" else classes
    else:
        inputs, vocabulary = torch.randn(rows, *shape, generator=generator), None
    size = (rows, *shape) if kind == "language" else (rows,)
    split = Split(inputs, torch.randint(0, classes, size, generator=generator))
    return Data("toy", kind, split, split, split, classes, shape, vocabulary, None)  # pyright: ignore[reportArgumentType]


IMAGES, TABLE = data("image", (3, 32, 32)), data("table", (12,))
TEXT, LANGUAGE = data("text", (20,)), data("language", (16,))
PARAMETERS = {
    "mlp": 3072 * 512 + 2 * 512 * 512 + 3 * 512 + 513 * 5,
    "mlp-small": 3073 * 128 + 129 * 128 + 129 * 5,
    "resmlp": 3073 * 256 + 8 * 257 * 256 + 257 * 5,
    "lenet": 76 * 6 + 151 * 16 + 577 * 120 + 121 * 84 + 85 * 5,
    "vgg-small": 1792 + 73_856 + 295_168 + 590_080 + 4096 * 5 + 5,
    "vgg-small-bn": 1728 + 73_728 + 294_912 + 589_824 + 2 * 704 + 4096 * 5 + 5,
    "resnet-small": 272_149,
    "resnet-small-plain": 271_365,
    "vit-small": 2_692_229,
    "text-bag": 30 * 64 + 65 * 128 + 129 * 128 + 129 * 5,
    "text-cnn": 30 * 64 + 100 * (64 * 12 + 3) + 301 * 5,
    "text-residual": 30 * 256 + 6 * (512 + 257 * 512 + 513 * 256) + 512 + 257 * 5,
    "text-transformer": 30 * 128 + 20 * 128 + 2 * 198_272 + 256 + 129 * 5,
    "gpt-small": 30 * 256 + 16 * 256 + 4 * 789_760 + 512 + 256 * 30,
}


def fitting(name: str) -> Data:
    if name.startswith("text"):
        return TEXT
    return LANGUAGE if name.startswith("gpt") else IMAGES


def loss(model: nn.Module, data: Data) -> torch.Tensor:
    return F.cross_entropy(model(data.train.inputs).flatten(0, -2), data.train.targets.flatten())


def test_every_name_has_a_description_and_a_count():
    assert set(names()) == set(PARAMETERS)
    assert all(names().values())


@pytest.mark.parametrize("name", PARAMETERS)
def test_forward_and_backward(name):
    data = fitting(name)
    model = build(name, data, seed=0)
    out = model(data.train.inputs)
    assert out.shape == (*data.train.targets.shape, data.classes)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    loss(model, data).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_few_steps_lower_the_loss(name):
    data = fitting(name)
    model = build(name, data, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    before = loss(model, data)
    for _ in range(8):
        optimizer.zero_grad()
        loss(model, data).backward()
        optimizer.step()
    assert loss(model, data) < 0.9 * before


@pytest.mark.parametrize("name", PARAMETERS)
def test_weights_depend_on_the_seed_alone(name):
    data = fitting(name)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = build(name, data, seed=0).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    two, other = build(name, data, seed=0).state_dict(), build(name, data, seed=1).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_pickle_and_copy(name):
    data = fitting(name)
    model = build(name, data, seed=0).eval()
    expected = model(data.train.inputs)
    for clone in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(clone(data.train.inputs), expected)


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_compile_as_one_graph(name):
    data = fitting(name)
    model = build(name, data, seed=0).eval()
    # tracing is what a graph break would stop; generating code adds nothing but time
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(data.train.inputs), model(data.train.inputs))
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 64, 64), (1, 105, 105)])
@pytest.mark.parametrize("name", [name for name in PARAMETERS if fitting(name) is IMAGES])
def test_image_models_fit_every_size(name, shape):
    data_set = data("image", shape)
    model = build(name, data_set, seed=0).eval()
    assert model(data_set.train.inputs[:2]).shape == (2, 5)


@pytest.mark.parametrize("name", ["mlp", "mlp-small", "resmlp"])
def test_dense_models_take_tables(name):
    assert build(name, TABLE)(TABLE.train.inputs).shape == (4, 5)


def test_plain_variants_have_no_batch_norm():
    for name, expected in (
        ("vgg-small", 0),
        ("vgg-small-bn", 4),
        ("resnet-small-plain", 0),
        ("resnet-small", 21),
    ):
        assert sum(isinstance(m, nn.BatchNorm2d) for m in build(name, IMAGES).modules()) == expected


def test_vgg_without_batch_norm_learns_digits():
    digits = load("digits")
    model = build("vgg-small", digits, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(3):
        for x, y in batches(digits.train, 64, seed=0, epoch=epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (model(digits.validation.inputs).argmax(1) == digits.validation.targets).float().mean()
    assert accuracy > 0.9


def test_residual():
    x = torch.randn(2, 3)
    branch, shortcut = nn.Linear(3, 3), nn.Linear(3, 3)
    assert torch.equal(Residual(branch)(x), x + branch(x))
    assert torch.equal(Residual(branch, shortcut)(x), shortcut(x) + branch(x))


@pytest.mark.parametrize(
    ("name", "branches"), [("resmlp", 4), ("resnet-small", 9), ("resnet-small-plain", 9), ("vit-small", 12),
                           ("text-transformer", 4), ("gpt-small", 8)]
)  # fmt: skip
def test_residual_branches_are_submodules(name, branches):
    assert sum(isinstance(m, Residual) for m in build(name, fitting(name)).modules()) == branches


def test_attention_agrees_with_torch():
    torch.manual_seed(0)
    ours, x = SelfAttention(16, 4, causal=False), torch.randn(2, 5, 16)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(
        {"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias}
        | {"out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias}
    )
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_gpt_does_not_see_the_future():
    model = build("gpt-small", LANGUAGE, seed=0).eval()
    tokens = LANGUAGE.train.inputs
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 30
    one, two = model(tokens), model(changed)
    torch.testing.assert_close(one[:, :10], two[:, :10])
    assert not torch.allclose(one[:, 10:], two[:, 10:])
    assert model(tokens[:, :7]).shape == (4, 7, 30)


def test_masked_mean_leaves_padding_out():
    x, tokens = (
        torch.tensor([[[1.0], [3.0], [100.0]], [[9.0], [9.0], [9.0]]]),
        torch.tensor([[4, 5, 0], [0, 0, 0]]),
    )
    assert masked_mean(x, tokens).tolist() == [[2.0], [0.0]]


# names and errors


def test_unknown_model():
    with pytest.raises(OptionError, match=r"No model vgg-smal\. Did you mean 'vgg-small'"):
        build("vgg-smal", IMAGES)


def test_model_of_another_kind():
    with pytest.raises(OptionError, match=r"gpt-small does not fit data set toy.*language.*image.*Use mlp, "):
        build("gpt-small", IMAGES)
    with pytest.raises(OptionError, match=r"Use gpt-small\.$"):
        build("vgg-small", LANGUAGE)


def test_image_too_small():
    with pytest.raises(OptionError, match=r"8 pixels.*these have 4.*Use mlp, mlp-small, resmlp, vit-small\."):
        build("lenet", data("image", (1, 4, 4)))


@pytest.fixture
def own_models(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(
        "import torch\n"
        "def shaped(data): return torch.nn.Linear(data.input_shape[0], data.classes)\n"
        "def fixed(width=3): return torch.nn.Linear(width, width)\n"
        "def wrong(): return 'a model'\n"
        "def two(shape, classes): return torch.nn.Linear(shape, classes)\n"
        "constant = 1\n"
    )
    (tmp_path / "broken_models.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_models", None)


@pytest.mark.usefixtures("own_models")
def test_imported_models():
    before = list(sys.path)
    model = build("own_models:shaped", TABLE, seed=0)
    assert (model.in_features, model.out_features) == (12, 5)
    assert build("own_models:fixed", TABLE).in_features == 3
    assert torch.equal(model.weight, build("own_models:shaped", TABLE, seed=0).weight)
    assert build("torch.nn:Identity", TABLE)(1) == 1
    assert sys.path == before


@pytest.mark.usefixtures("own_models")
def test_options_are_keyword_arguments():
    assert build("own_models:fixed", TABLE, options={"width": 7}).in_features == 7
    assert build("mlp", TABLE, options={"widths": [8, 4]}).head.in_features == 4
    assert build("mlp-small", TABLE, options={"widths": [8, 4]}).head.in_features == 4
    assert (
        build("vgg-small", IMAGES, options={"stages": [[4], [6]], "batch_norm": True}).head.in_features % 6
        == 0
    )
    with pytest.raises(OptionError, match=r"model mlp has no option 'width'\. Did you mean 'widths'"):
        build("mlp", TABLE, options={"width": [8]})
    with pytest.raises(OptionError, match="own_models:fixed has no option 'depth'"):
        build("own_models:fixed", TABLE, options={"depth": 2})


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:net", "no module no_such_module"),
        ("own_models:shape", r"no callable shape\. Did you mean 'shaped'"),
        ("own_models:constant", "no callable constant"),
        ("own_models:", "no callable after the colon"),
        ("own_models:wrong", "returned a str"),
        ("own_models:two", "called with the data set, it says: missing a required argument: 'classes'"),
        (":net", "nothing is no module name"),
    ],
)
def test_imported_models_that_cannot_be_used(name, says):
    with pytest.raises(OptionError, match=says):
        build(name, TABLE)


@pytest.mark.usefixtures("own_models")
def test_a_missing_import_inside_the_module_is_shown_as_it_is():
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        build("broken_models:net", TABLE)
