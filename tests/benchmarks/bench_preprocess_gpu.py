"""The real VAE shape with random weights on this machine's GPU: frames/s, TFLOP/s, memory, and each mode's error.

    python tests/benchmarks/bench_preprocess_gpu.py [--compile] [--frames 49]

Random weights of the published sizes, a moving pattern as pictures, 832×480 and 1280×704, fp32, fp16 and bf16, channels
last and contiguous. The figures to compare with are estimates: at 1280×704×49 a V100 13–15 s in fp32 and 5 s in fp16,
an A100 1.2 s, an H100 0.35–0.45 s. Errors with random weights say how a mode computes, not what it does to real
latents: that is measured by `encoders.vae_precision=auto` on the corpus. Without a GPU it says so and proves nothing.
Put what it prints into docs/performance.md with the hardware and the date.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from preprocess.build.vae_precision import encoder_device, fast_modes, relative_error
from preprocess.encoders.encoders import VaeEncoder, quiet_libraries
from preprocess.encoders.vae_config import vae_arguments
from preprocess.forecast.forecast import vae_encode_tflop
from shards.errors import UserError

SIZES = ((832, 480), (1280, 704))
WARM_UP, RUNS = 1, 3
GIB = 2**30


def pattern(width: int, height: int, num_frames: int) -> np.ndarray:
    """A smooth random picture that moves, uint8 T×H×W×3."""
    small = np.random.default_rng(0).random((1, 3, height // 16, width // 16), dtype=np.float32)
    still = torch.nn.functional.interpolate(torch.from_numpy(small), size=(height, width), mode="bicubic")[0]
    frames = torch.stack([still.roll(3 * number, dims=-1) for number in range(num_frames)])
    return (frames.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def load(mode: str, *, channels_last: bool, compiled: bool) -> VaeEncoder:
    """The VAE of the published sizes, its encoder alone, with the same random weights each time."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(**vae_arguments()).eval().requires_grad_(False)
    vae.decoder = torch.nn.Identity()
    device = torch.device("cuda")
    return VaeEncoder(vae, device=device, precision=mode, channels_last=channels_last, compiled=compiled)


def measure(encoder: VaeEncoder, frames: np.ndarray) -> tuple[np.ndarray, float, float]:
    """The latent, the median seconds of a clip, the peak GiB."""
    seconds = []
    for _ in range(WARM_UP + RUNS):
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        latent = encoder.encode(frames)
        seconds.append(time.perf_counter() - start)
    return latent, statistics.median(seconds[WARM_UP:]), torch.cuda.max_memory_allocated() / GIB


def main() -> None:
    """Print a line for each size, mode and layout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--frames", type=int, default=49)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU on this machine: nothing is measured and nothing is proven")
        return
    quiet_libraries()
    facts = encoder_device(torch.device("cuda"))
    print(f"{facts.name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, compiled: {asked.compile}")
    references: dict[tuple[int, int], np.ndarray] = {}
    for mode in ("fp32", *fast_modes(facts)[0]):
        for channels_last in (True, False):
            encoder = load(mode, channels_last=channels_last, compiled=asked.compile)
            for width, height in SIZES:
                what = f"{width}×{height}×{asked.frames} {mode} {'channels last' if channels_last else 'contiguous'}"
                try:
                    latent, seconds, peak = measure(encoder, pattern(width, height, asked.frames))
                except UserError as error:
                    print(f"{what}: {error.problem}")
                    continue
                error = relative_error(latent, references.setdefault((width, height), latent))
                told = "not finite" if error is None else f"{error:.2e}"
                tflops = vae_encode_tflop(width, height, asked.frames) / seconds
                print(
                    f"{what}: {seconds:.3f} s a clip, {asked.frames / seconds:.1f} frames/s, {tflops:.1f} TFLOP/s, "
                    f"peak {peak:.1f} GiB, error against fp32 {told}",
                    flush=True,
                )
            del encoder
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
