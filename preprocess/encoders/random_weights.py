"""Small encoders with random weights: the real classes and the real tokenizer, none of the knowledge.

They replace the checkpoint in the demonstration and in the tests. Everything is a function of one seed.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

VAE_BASE_DIM = 8
TEXT_DIM = 64
NOTE = "random weights"

# All text that the tokenizer is trained on. Changing a character changes the digest, and with it every text set.
_SENTENCES = """
한 사람이 바닷가를 천천히 걷고 있다.
파도가 모래사장 위로 밀려왔다가 다시 빠져나간다.
시장 골목에서 상인들이 채소와 과일을 팔고 있다.
아이들이 운동장에서 공을 차며 뛰어논다.
푸른 산 위로 흰 구름이 지나간다.
오래된 한옥 지붕 위에 눈이 쌓여 있다.
축제에서 사람들이 전통 옷을 입고 춤을 춘다.
자동차들이 도심의 다리를 건너 달린다.
기자가 카메라 앞에서 소식을 전하고 있다.
밝은 사각형이 화면을 가로질러 오른쪽으로 움직인다.
둥근 원이 화면 가운데에서 회전한다.
색깔 막대가 위에서 아래로 천천히 흐른다.
어두운 배경 위에서 작은 점들이 빠르게 흩어진다.
줄무늬가 왼쪽으로 밀려나며 모양이 바뀐다.
지역 방송의 자료 화면으로 쓰기에 알맞다.
생활 문화 자연 풍경 공간 건축 역사 사회 사건 사고
평화롭고 조용한 분위기를 전한다.
활기차고 즐거운 느낌을 준다.
가까이에서 본 모습과 멀리에서 본 모습이 번갈아 나온다.
화면은 천천히 오른쪽에서 왼쪽으로 이동한다.
A man walks slowly along the beach while waves roll in.
The camera pans from left to right over a green valley.
A bright square moves across a dark background.
Coloured bars scroll from the top to the bottom of the picture.
Traffic crosses a bridge in the city at night.
Children play football on the school ground.
色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰
""".strip()


def build_random_vae(seed: int) -> Any:
    """A small `AutoencoderKLWan` in its Wan2.2 form whose latents have about the published mean and deviation.

    The last convolution is scaled on a fixed moving pattern, in steps of 1/64, so that what comes out after
    normalisation is near N(0, 1) as with the real weights; a random stack alone gives nearly constant latents.
    """
    import torch
    from diffusers import AutoencoderKLWan

    from preprocess.encoders.vae_config import LATENT_MEAN, LATENT_STD, vae_arguments

    with _seeded(seed):
        vae: Any = AutoencoderKLWan(**vae_arguments(VAE_BASE_DIM))
        pattern_1CTHW = torch.rand(1, 3, 1, 8, 8).repeat(1, 1, 9, 1, 1) * 2 - 1
    pattern_1CTHW = torch.nn.functional.interpolate(pattern_1CTHW, size=(9, 96, 96), mode="trilinear")
    pattern_1CTHW = torch.stack([pattern_1CTHW[:, :, t].roll(6 * t, dims=-1) for t in range(9)], dim=2)
    with torch.no_grad():
        mean_CTHW = vae.encode(pattern_1CTHW).latent_dist.mode()[0]
        values_CN = mean_CTHW.flatten(1)
        gain_C = torch.tensor(LATENT_STD) / values_CN.std(dim=1)
        gain_C = (gain_C * 64).round().clamp(min=1) / 64
        offset_C = ((torch.tensor(LATENT_MEAN) - values_CN.mean(dim=1) * gain_C) * 64).round() / 64
        channels = len(LATENT_MEAN)
        vae.quant_conv.weight[:channels] *= gain_C.view(-1, 1, 1, 1, 1)
        vae.quant_conv.bias[:channels] = vae.quant_conv.bias[:channels] * gain_C + offset_C
    return vae


def build_random_text_encoder(seed: int, vocab_size: int) -> Any:
    """A small `UMT5EncoderModel` (two layers, width `TEXT_DIM`) with random weights."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    with _seeded(seed):
        return UMT5EncoderModel(config)


def train_tokenizer_model() -> bytes:
    """Train the demonstration's sentencepiece model on the text above; the same bytes every time."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES.splitlines()),
        model_writer=model,
        model_type="unigram",
        vocab_size=700,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def load_tokenizer_model(model: bytes) -> Any:
    """A transformers `T5Tokenizer` over the bytes of a sentencepiece model."""
    from transformers import T5Tokenizer

    with tempfile.TemporaryDirectory(prefix="wanprep-tokenizer-") as folder:
        (Path(folder) / "spiece.model").write_bytes(model)
        return T5Tokenizer.from_pretrained(folder, extra_ids=0)


@contextmanager
def _seeded(seed: int) -> Iterator[torch.Generator]:
    """Seed torch's CPU generator for a block and give the caller's state back afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        yield torch.manual_seed(seed)
