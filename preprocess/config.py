"""Configuration of stage 1, one class per section of the YAML file. Importing it imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from glob import has_magic
from itertools import takewhile
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from shards.config import Config, StorageConfig

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveSeconds = Annotated[float, Field(gt=0)]

CAPTION_LEVELS = ("object", "scene", "semantic", "application", "speech")
"""Levels of captions, the most visual first: the order in which they are kept when not all fit."""


TABLE_FIELDS = (
    "path", "id", "caption", *CAPTION_LEVELS, "start", "end", "seconds", "fps", "width", "height", "category",
    "media_type",
)  # fmt: skip
"""What a column of a table can be; `caption` is the level `object`. All other columns are tags."""


def fixed_part(path: Path) -> Path:
    """The folders of a path before the first that has a wildcard."""
    return Path(*takewhile(lambda part: not has_magic(part), path.parts[:-1]))


class CorpusConfig(Config):
    """Where the clips and their captions are; docs/corpus.md shows every layout."""

    location: str
    """A folder, an `s3://bucket/prefix`, a table (`.csv`, `.tsv`, `.jsonl`, `.parquet`: a path, a URL, or a pattern of
    its shards such as `data/train-*.parquet`), or a `.jsonl`, `.jsonl.zst`, `.zip` or `.tar` of annotations."""
    format: Literal["auto", "mbc", "folder", "table"] = "auto"
    """`mbc`: annotation JSON; `folder`: clips with a text file beside each; `table`: one row per clip; `auto`: as the
    files show."""
    caption_suffix: Annotated[str, Field(pattern=r"^\.[^/]+$")] = ".txt"
    """`folder`: the ending of the caption beside a clip: `walk.mp4`, `walk.txt`."""
    columns: dict[str, str] = Field(default_factory=dict)
    """`table`: the names of columns that are not found by themselves, such as `{path: clip_file, caption: text_en}`."""
    root: str | None = None
    """`table`: where relative paths start: a folder or a URL prefix; null: the folder of the table."""
    limit: Positive | None = None
    """Plan only the first N candidates. A higher limit later adds the next ones; the first N stay as they are."""

    @property
    def media_root(self) -> Path | None:
        """The folder that local clips are in; None where the corpus is not on this machine."""
        place = self.root or self.location
        if "://" in place:
            return None
        path = Path(place)
        if self.root or path.is_dir():
            return path
        # Of a location with wildcards what comes before them.
        return path.parent if path.exists() or not has_magic(place) else fixed_part(path)

    @model_validator(mode="after")
    def _known_fields(self) -> CorpusConfig:
        for name in self.columns:
            if name not in TABLE_FIELDS:
                near = difflib.get_close_matches(name, TABLE_FIELDS, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"columns: {name} is not one of {', '.join(TABLE_FIELDS)}{hint}")
        return self


class SieveConfig(Config):
    """Rules on annotation records, applied before anything is downloaded; each rule has a reason code."""

    min_seconds: PositiveSeconds = 3.0
    """Shortest clip, inclusive: checked on the declared length, and again on the probed length."""
    max_seconds: PositiveSeconds = 30.0
    """Longest clip, inclusive."""
    images: bool = False
    """Admit image items as one-frame samples."""
    min_caption_characters: Annotated[int, Field(ge=0)] = 1
    """Fewest characters of all captions joined."""
    max_caption_characters: Positive = 1500
    """Most characters of all captions joined; longer texts are usually defective."""
    max_word_repeats: Positive | None = 9
    """A word that occurs more often in one caption is a defect; null switches the rule off."""
    max_character_repeats: Positive | None = 14
    """A character repeated in a row more often is a defect; null switches the rule off."""

    @model_validator(mode="after")
    def _ordered(self) -> SieveConfig:
        if self.min_seconds > self.max_seconds:
            raise ValueError(f"min_seconds {self.min_seconds} is above max_seconds {self.max_seconds}")
        return self


class WindowConfig(Config):
    """Which stretch of a clip becomes a sample."""

    num_frames: Positive | Annotated[tuple[Positive, ...], Field(min_length=1)] = 49
    """Frames of a window, 4k+1 (1 for images); or a list: the longest that fits the clip and its captions is taken."""
    fps: Literal[24] = 24
    """Frame rate of the window; the model's own."""
    policy: Literal["captions", "start", "middle", "tile", "random"] = "captions"
    """Where windows are: `captions`: centred on the time-coded captions; `start` or `middle` of the clip; `tile`: one
    after the other; `random`: at random places that depend on `seed` and the clip id."""
    max_windows: Positive = 1
    """Most windows taken from one clip."""
    max_scene_score: Annotated[float, Field(gt=0, le=1)] | None = None
    """Windows do not cross a shot change: a frame with a higher ffmpeg scene score is one; null: no search."""
    min_motion: Share = 0.0001
    """Smallest share of the picture that moves in a window; the default refuses windows in which nothing moves, 0
    refuses none. Samples of one frame are exempt."""
    max_black_share: Share = 0.999
    """Largest share of a window's pixels that are black; the default refuses all-black windows, 1 refuses none."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Frames that a window may have, the fewest first."""
        return (self.num_frames,) if isinstance(self.num_frames, int) else tuple(sorted(self.num_frames))

    @model_validator(mode="after")
    def _whole_latents(self) -> WindowConfig:
        for length in self.lengths:
            if length % 4 != 1:
                below = max(1, (length - 1) // 4 * 4 + 1)
                raise ValueError(f"num_frames {length} is not 4k+1; the nearest are {below} and {below + 4}")
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"num_frames {', '.join(map(str, self.lengths))}: a length is there twice")
        if self.policy in ("start", "middle") and self.max_windows > 1:
            raise ValueError(f"policy {self.policy} takes one window of a clip, not {self.max_windows}; see tile")
        return self


class PictureSize(Config):
    """A picture size, in pixels."""

    width: Positive
    """Pixels, a multiple of 32."""
    height: Positive
    """Pixels, a multiple of 32."""

    @model_validator(mode="before")
    @classmethod
    def _not_a_text(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError("a size is written {width: 832, height: 480}")
        return value

    @model_validator(mode="after")
    def _whole_patches(self) -> PictureSize:
        if self.width % 32 or self.height % 32:
            raise ValueError(f"{self.width}×{self.height}: both sides must be multiples of 32")
        return self


class BucketsConfig(Config):
    """The sizes that samples are encoded at."""

    sizes: Annotated[tuple[PictureSize, ...], Field(min_length=1)] = (
        PictureSize(width=832, height=480),
        PictureSize(width=480, height=832),
        PictureSize(width=1280, height=704),
        PictureSize(width=704, height=1280),
    )
    """Sizes to choose from: each clip gets the one whose shape is nearest to its displayed picture."""
    max_upscale: Annotated[float, Field(ge=1)] = 1.0
    """Largest enlargement of the displayed picture; a clip that every size would enlarge more is refused."""
    min_kept_share: Share = 0.5
    """Smallest share of the displayed picture that the centre crop may keep; a clip that would keep less is refused."""


def check_template(template: str) -> str:
    """A caption template as it is. Raises ValueError unless its fields are levels, at least one."""
    try:
        fields = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"not a template: {error}") from None
    if not fields:
        raise ValueError(
            f"names no level; expected one or more of {', '.join(f'{{{name}}}' for name in CAPTION_LEVELS)}"
        )
    for _, name, spec, conversion in fields:
        if name not in CAPTION_LEVELS or spec or conversion:
            near = difflib.get_close_matches(str(name), CAPTION_LEVELS, n=1)
            hint = f"; did you mean {{{near[0]}}}?" if near else ""
            raise ValueError(f"{{{name}}} is no level of {', '.join(CAPTION_LEVELS)}{hint}")
    return template


Template = Annotated[str, AfterValidator(check_template)]


class CaptionsConfig(Config):
    """How captions are composed."""

    template: Template = "{object} {scene} {semantic} {application} {speech}"
    """Levels in the order they are joined: `{object}`, `{scene}`, `{semantic}`, `{application}`, `{speech}`."""
    variants: tuple[Template, ...] = ()
    """Further templates; each makes another caption of the sample with its own embedding."""
    prefix: str = ""
    """Text before every caption that has words, such as a trigger word; it is never cut."""
    max_tokens: Annotated[int, Field(gt=1, le=512)] = 512
    """Most tokens, end token included."""
    negative_prompt: str | None = None
    """Text of the second null embedding; null: the model's default negative prompt."""


class SigningConfig(Config):
    """How requests to a private CloudFront distribution are signed; the key comes from the environment alone."""

    mode: Literal["none", "url", "policy", "cookies"] = "none"
    """`url`: a canned policy in each URL; `policy`: a custom one; `cookies`: a custom one in cookies."""
    hosts: tuple[str, ...] = ("*.cloudfront.net",)
    """Hosts that get a signature, exact or `*.suffix`; no other host does."""
    resource: str | None = None
    """What a signature gives access to, such as `https://HOST/clips/*`; null: one clip, with `cookies` the host."""
    valid_seconds: Annotated[int, Field(ge=10)] = 3600
    """Lifetime of a signature; a new one is made before it ends, and when the server refuses one."""

    @model_validator(mode="after")
    def _resource_is_read(self) -> SigningConfig:
        if self.resource is not None and self.mode not in ("policy", "cookies"):
            raise ValueError(f"resource is for mode policy or cookies, and mode is {self.mode}")
        return self


class FetchConfig(Config):
    """How clips are downloaded."""

    allow_hosts: tuple[str, ...] = ("*.cloudfront.net",)
    """Hosts that clips may come from, exact or `*.suffix`, and `s3://bucket`; redirects to others are refused."""
    mirrors: dict[str, str] = Field(default_factory=dict)
    """URL prefixes that are replaced before a request: `https://a/clips/: http://b/` reads clips from a copy at b."""
    timeout_seconds: PositiveSeconds = 60.0
    """Longest time in which a connection gives no byte."""
    deadline_seconds: PositiveSeconds = 600.0
    """Longest time for the download of one clip."""
    max_mib: Positive = 2048
    """Largest clip."""
    min_kib_per_second: Annotated[float, Field(ge=0)] = 4.0
    """Slowest transfer, over `timeout_seconds`; 0: any."""
    per_host: Positive = 16
    """Most downloads from one host at a time."""
    attempts: Positive = 4
    """Attempts at one clip before it becomes a ledger row."""
    outage_minutes: Annotated[float, Field(ge=0)] = 60.0
    """Longest wait for a host that does not answer any request, before the build stops with exit code 75 (run it again
    to resume); no row is written meanwhile. 0: no wait, each clip of such a host becomes a row."""
    user_agent: Annotated[str, Field(pattern=r"^[ -~]*$")] = "wanprep"
    """The User-Agent header of requests over HTTP(S)."""
    sign: SigningConfig = SigningConfig()
    """Signatures for a private CloudFront distribution."""
    s3_endpoint: str | None = None
    """Another S3 server for `s3://` clips; null: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or AWS itself."""
    cache: str | None = None
    """Folder of a cache of clips that builds share; null: no cache."""
    cache_gib: PositiveSeconds = 50.0
    """Largest size of the cache."""


class DecodeConfig(Config):
    """How clips are decoded."""

    policy: Literal["strict", "tolerant"] = "strict"
    """`strict` refuses a window with any decoding error; `tolerant` accepts it if all frames were decoded."""
    timeout_seconds: PositiveSeconds = 120.0
    """Wall-clock limit of one ffmpeg run."""
    max_megapixels: PositiveSeconds = 40.0
    """Largest coded picture."""
    max_memory_mib: Positive = 1024
    """ffmpeg's limit for one allocation."""
    sd_display_aspect: Literal["4:3", "16:9"] = "4:3"
    """Display aspect of a standard-definition picture (720×480, 720×576 …) if nothing else gives it."""
    threads: Positive = 1
    """Threads of one ffmpeg process."""


class EncodersConfig(Config):
    """The frozen VAE and text encoder."""

    checkpoint: str | None = None
    """Folder of Wan2.2-TI2V-5B, official or Diffusers layout; null: small random weights (for demonstrations)."""
    random_seed: int = 0
    """Seed of the small random weights when there is no checkpoint."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` …"""
    vae_precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Precision of the VAE. `auto`: the first build tries 16-bit modes on clips of the plan and keeps the choice."""
    vae_tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.005
    """Largest relative error (root mean square, against fp32's latents) of a 16-bit mode that `auto` may take."""
    vae_channels_last: bool | None = None
    """Memory format channels_last_3d, which 16-bit GPU kernels need to be fast; null: yes on a GPU, no on a CPU."""
    vae_compile: bool = False
    """torch.compile of the VAE: minutes at the start for each picture size; it is part of the latents' identity."""
    vae_low_traffic: bool = False
    """Encode with 0.43 of the library's memory traffic; other last bits, so it is part of the latents' identity. Not
    together with `vae_compile`."""
    text_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of UMT5; `auto`: bf16, or fp32 on a GPU that only emulates bf16 (V100, T4); a text set that was begun
    keeps its precision. Never fp16."""

    @model_validator(mode="after")
    def _one_forward(self) -> EncodersConfig:
        if self.vae_compile and self.vae_low_traffic:
            raise ValueError("vae_compile and vae_low_traffic: choose one; Inductor fuses the library's encoder itself")
        return self


class ShardsConfig(Config):
    """How many candidates a shard has, and what it stores."""

    unit_size: Positive = 64
    """Candidates per unit of work, that is per tar."""
    latent_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of stored latents; text is always the encoder's bf16."""
    preview_frames: Annotated[int, Field(ge=0, le=16)] = 4
    """Small frames in a sample's preview strip; 0: none."""


class RayConfig(Config):
    """How `engine.kind: ray` finds its cluster, and what each worker reserves."""

    address: str = "auto"
    """`auto`: the cluster this machine belongs to or RAY_ADDRESS names; `host:port`; `local`: this machine alone."""
    num_workers: Positive | None = None
    """Most workers; null: one per GPU of the cluster, or, without a GPU, as many as its cores allow."""
    num_cpus: Positive | None = None
    """Cores that a worker reserves; null: `engine.decoders` + 1, of `auto` the share of a GPU."""


MAX_AUTO_DECODERS = 16
"""The fastest card takes 0.2 s to encode a window, a core 0.9 s to decode it: more were of no use, and cost memory."""


class EngineConfig(Config):
    """Devices and machines of a build. Nothing here changes a byte of the shards."""

    kind: Literal["local", "ray"] = "local"
    """`local`: this machine's devices; `ray`: a worker per GPU of a Ray cluster (the extra `ray`)."""
    decoders: Positive | Literal["auto"] = "auto"
    """Clips decoded at a time, for each encoder; `auto`: its share of the cores but one, at most 16. Downloads have
    threads of their own, `fetch.per_host`."""
    max_queue_mib: Positive = 2048
    """Most MiB of decoded frames that wait for each encoder."""
    devices: tuple[str, ...] = ()
    """Devices of this machine that encode latents, one process each, such as `[cuda:0, cuda:1]`; empty: every GPU if
    `encoders.device` is `auto`, else only that device."""
    ray: RayConfig = RayConfig()

    def num_decoders(self, num_cores: int, num_encoders: int, on_cpu: bool) -> int:
        """`decoders`, with `auto` resolved for each of so many encoders that share so many cores.

        One core is left to the encoder's own thread, the downloads and the writer; an encoder on the CPU gets most.
        """
        if self.decoders != "auto":
            return self.decoders
        share = num_cores // num_encoders
        return max(1, min(2, share // 2) if on_cpu else min(MAX_AUTO_DECODERS, share - 1))


class PrepConfig(Config):
    """`wanprep build-shards`: all of stage 1."""

    output: str
    """Folder or `s3://bucket/prefix` of the dataset."""
    seed: int = 0
    """Seed of random choices (`window.policy: random`)."""
    corpus: CorpusConfig
    sieve: SieveConfig = SieveConfig()
    window: WindowConfig = WindowConfig()
    buckets: BucketsConfig = BucketsConfig()
    captions: CaptionsConfig = CaptionsConfig()
    fetch: FetchConfig = FetchConfig()
    decode: DecodeConfig = DecodeConfig()
    encoders: EncodersConfig = EncodersConfig()
    shards: ShardsConfig = ShardsConfig()
    engine: EngineConfig = EngineConfig()
    storage: StorageConfig = StorageConfig()


Choice = int | float | tuple[int, ...]
FROZEN: dict[str, tuple[str, ...]] = {
    "window": ("num_frames", "min_motion", "max_black_share"),
    "buckets": ("min_kept_share",),
}
"""Keys that enter no identity: each generation of a plan is built with those that it was frozen with."""


def frozen_choices(config: PrepConfig) -> dict[str, Choice]:
    """The values of the `FROZEN` keys, by their dotted names; one length is a number, however it was written."""
    choices = {f"{section}.{name}": getattr(getattr(config, section), name) for section, name in _frozen_names()}
    lengths = config.window.lengths
    return choices | {"window.num_frames": lengths[0] if len(lengths) == 1 else lengths}


def with_choices(config: PrepConfig, choices: Mapping[str, Choice]) -> PrepConfig:
    """`config` with frozen choices in place of its own; one that is absent counts as its default."""
    sections: dict[str, Config] = {"window": config.window, "buckets": config.buckets}
    for section, name in _frozen_names():
        if choices:
            default = type(sections[section]).model_fields[name].default
            value = choices.get(f"{section}.{name}", default)
            sections[section] = sections[section].model_copy(update={name: value})
    return config.model_copy(update=sections)


def _frozen_names() -> list[tuple[str, str]]:
    return [(section, name) for section, names in FROZEN.items() for name in names]
