"""A LoRA inside other people's modules: a stand-in with the official model's names, and diffusers' own class."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shards.errors import UserError
from train.config.model import DiTConfig, LoRAConfig
from train.lora.formats import name_tensors, raw_pairs, read_lora
from train.lora.load import load
from train.lora.lora import detach, inject, linears, lora_modules, lora_state, merge, unmerge
from train.model.dit import build_model

DIMS = DiTConfig(dim=48, num_heads=2, num_layers=2, ffn_dim=96, text_dim=16, text_len=8, freq_dim=16)
LORA = LoRAConfig(rank=4, alpha=8.0, targets=("self_attn", "cross_attn", "ffn"))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIMS.dim, DIMS.dim) for _ in "qkvo")

    def forward(self, x, context):
        return self.o(nn.functional.scaled_dot_product_attention(self.q(x), self.k(context), self.v(context)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(), Attention()
        self.ffn = nn.Sequential(nn.Linear(DIMS.dim, DIMS.ffn_dim), nn.GELU(), nn.Linear(DIMS.ffn_dim, DIMS.dim))

    def forward(self, x, context):
        x = x + self.self_attn(x, x)
        x = x + self.cross_attn(x, context)
        return x + self.ffn(x)


class WanModel(nn.Module):
    """Names, shapes and plain `nn.Linear`s of Wan2.2's wan/modules/model.py; it computes less."""

    def __init__(self):
        super().__init__()
        self.text_embedding = nn.Sequential(nn.Linear(16, DIMS.dim), nn.GELU(), nn.Linear(DIMS.dim, DIMS.dim))
        self.blocks = nn.ModuleList(Block() for _ in range(DIMS.num_layers))

    def forward(self, x, context):
        context = self.text_embedding(context)
        for block in self.blocks:
            x = block(x, context)
        return x


@pytest.fixture
def official():
    torch.manual_seed(0)
    return WanModel().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trained():
    model = build_model(DIMS, seed=1)
    inject(model, LORA, seed=2)
    with torch.no_grad():
        for place, (name, tensor) in enumerate(lora_state(model).items()):
            if ".lora_B." in name:
                tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(place))
    return model.eval()


@pytest.fixture
def file(trained, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(name_tensors(raw_pairs(lora_state(trained), LORA)), path)
    return path


def _run(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return model(torch.randn(1, 6, 48, generator=generator, dtype=dtype), torch.randn(1, 8, 16, generator=generator))


def _by_hand(model, path, strength):
    """A copy whose weights are W + strength · scale · B A."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for module, pair in read_lora(path).pairs.items():
            other.get_submodule(module).weight += strength * pair.scale * (pair.up_Or @ pair.down_rI)
    return other


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("injected", [False, True])
def test_the_official_module_takes_our_file_merges_and_unmerges_to_the_bit(injected, strength, official, file):
    before = {name: weight.clone() for name, weight in official.state_dict().items()}
    plain, truth = _run(official), _by_hand(official, file, strength)
    if injected:
        names = inject(official, LORA.model_copy(update={"alpha": 1.0}))
        assert len(names) == 20
        assert torch.equal(_run(official), plain)  # B is zero
    load(official, file, strength)
    beside = _run(official)
    torch.testing.assert_close(beside, _run(truth), atol=1e-5, rtol=1e-5)
    assert (beside - plain).abs().max() > 0.01
    merge(official)
    assert not lora_modules(official)
    for name, weight in official.state_dict().items():
        torch.testing.assert_close(weight, truth.state_dict()[name], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(_run(official), beside, atol=1e-5, rtol=1e-5)
    unmerge(official)
    assert torch.equal(_run(official), beside)
    merge(official)
    detach(official)
    assert torch.equal(_run(official), plain)
    after = official.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_model_that_was_moved_while_merged_is_all_in_its_new_place(official, file):
    """Pipelines move a model to the GPU and back; `meta` stands in for the GPU."""
    load(official, file)
    merge(official)
    official.to("meta")
    unmerge(official)
    assert {str(weight.device) for weight in official.parameters()} == {"meta"}


def test_under_autocast_with_16_bit_weights_as_the_official_code_runs_it(official, file):
    official.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        plain = _run(official)
        load(official, file)
        adapted = _run(official)
    assert adapted.dtype == plain.dtype
    truth = _run(_by_hand(_without(official), file, 1.0))
    assert (adapted.float() - truth).abs().max() < 0.1 * (truth - plain.float()).abs().max()


def _without(official):
    """The same base in float32, without the LoRA."""
    other = copy.deepcopy(official)
    detach(other)
    return other.float()


def test_linears_outside_of_the_blocks_are_adapted_too(official, tmp_path):
    tensors = {
        "lora_unet__text_embedding_0.lora_down.weight": torch.randn(2, 16),
        "lora_unet__text_embedding_0.lora_up.weight": torch.randn(48, 2),
        "lora_unet__blocks_1_ffn_0.lora_down.weight": torch.randn(3, 48),
        "lora_unet__blocks_1_ffn_0.lora_up.weight": torch.randn(96, 3),
    }
    save_file(tensors, tmp_path / "videox.safetensors")
    truth = _by_hand(official, tmp_path / "videox.safetensors", 1.0)
    load(official, tmp_path / "videox.safetensors")
    torch.testing.assert_close(_run(official), _run(truth), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_diffusers_own_class_gives_the_numbers_of_our_model(trained, diffusers_twin, file):
    base = copy.deepcopy(trained)
    detach(base)
    twin = diffusers_twin(base)
    generator = torch.Generator().manual_seed(4)
    latent, text = torch.randn(1, 48, 2, 4, 4, generator=generator), torch.randn(1, 8, 16, generator=generator)
    time = torch.tensor([500.0])

    def theirs():
        with torch.no_grad():
            return twin(latent, time, text, return_dict=False)[0]

    plain = theirs()
    with torch.no_grad():
        ours = trained(latent, time, torch.tensor([False]), text)
    assert list(linears(twin).values())[-1].startswith("proj_out")
    load(twin, file)
    torch.testing.assert_close(theirs(), ours, atol=1e-4, rtol=1e-4)
    assert (ours - plain).abs().max() > 0.01
    merge(twin)
    torch.testing.assert_close(theirs(), ours, atol=1e-4, rtol=1e-4)
    detach(twin)
    assert torch.equal(theirs(), plain)


def test_what_is_refused(official, file):
    with pytest.raises(UserError, match="Sequential has no linear that is called as in Wan"):
        load(nn.Sequential(nn.Linear(2, 2)), file)
    with pytest.raises(UserError, match="no LoRA to merge"):
        merge(official)
    load(official, file)
    with pytest.raises(UserError, match="has a LoRA already"):
        inject(official, LORA)
    merge(official)
    for again in (lambda: load(official, file), lambda: inject(official, LORA)):
        with pytest.raises(UserError, match="has a LoRA already"):
            again()


def test_a_merge_that_16_bits_cannot_hold_is_refused_and_nothing_is_changed(official, file):
    """A row near the end of fp16 in the last adapted module: those before it are what they were."""
    official.half()
    with torch.no_grad():
        official.blocks[1].ffn[2].weight[3] = 65_000
    load(official, file, 1e5)
    before = {name: value.clone() for name, value in official.state_dict().items()}
    with pytest.raises(UserError, match=r"blocks\.1\.ffn\.2: not finite as float16"):
        merge(official)
    after = official.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    detach(official)
