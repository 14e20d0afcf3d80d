"""Every number that tells one SANA from another, and nothing else.

A `ModelConfig` describes the four parts of a pipeline: text encoder → DiT → scheduler → autoencoder. `BUILT_IN` holds the
published variants (arXiv 2410.10629, 2501.18427, 2503.09641). Notation, used throughout: B images, N = H·W latent tokens,
L text tokens, C hidden channels, F Mix-FFN channels.
"""

from dataclasses import dataclass, field, replace

DIALECTS = ("diffusers", "original")


@dataclass(frozen=True)
class DiTConfig:
    """The linear diffusion transformer (`sana_model.dit`). The defaults are SANA 1.6B at 1024 px."""

    hidden: int = 2240  # C
    layers: int = 20
    head_dim: int = 32  # of the linear self-attention; C / head_dim heads
    cross_heads: int = 20  # of the softmax cross-attention; head dim C / cross_heads
    mlp_ratio: float = 2.5  # F = int(mlp_ratio · C); the Mix-FFN expands to 2F
    in_channels: int = 32
    out_channels: int = 32
    caption_channels: int = 2304
    sample_size: int = 32  # side of the native latent; the native image is 32 × this
    qk_norm: bool = False  # RMSNorm over all of C on q and k, in both attentions (SANA-1.5, Sprint)
    pos_embed_scale: float | None = None  # None: no position embedding; 2K models 1.0, 4K models 2.0
    guidance_embeds: bool = False  # Sprint: the guidance scale is an input instead of a second forward
    guidance_embeds_scale: float = 0.1
    timestep_scale: float = 1.0
    clamp: bool = False  # fp16-trained checkpoints saw the self-attention output clipped to ±65504
    norm_eps: float = 1e-6  # LayerNorm
    attention_eps: float = 1e-15  # added to the denominator of the linear attention
    qk_norm_eps: float = 1e-5
    cross_qk_norm_eps: float = 1e-5

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim

    @property
    def cross_head_dim(self) -> int:
        return self.hidden // self.cross_heads

    @property
    def ffn(self) -> int:
        """F, the width after the gated linear unit; the expansion is 2F wide."""
        return int(self.mlp_ratio * self.hidden)


@dataclass(frozen=True)
class TextEncoderConfig:
    """Gemma-2, or Gemma-3 where `qk_norm` (`sana_model.text_encoder`). The defaults are Gemma-2-2B."""

    vocab: int = 256000
    hidden: int = 2304
    layers: int = 26
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 256
    ffn: int = 9216
    query_pre_attn_scalar: float = 256.0
    attn_softcap: float | None = 50.0
    sliding_window: int = 4096
    full_every: int = 2  # of so many layers the last sees everything, the others slide
    rope_theta: float = 10000.0
    full_rope_theta: float | None = None  # of the layers that see everything; None: as the others
    qk_norm: bool = False  # RMSNorm of every head's query and key before they are rotated
    norm_eps: float = 1e-6

    def sees_everything(self, layer: int) -> bool:
        return layer % self.full_every == self.full_every - 1


@dataclass(frozen=True)
class AutoencoderConfig:
    """DC-AE (sana_model/autoencoder). The defaults are dc-ae-f32c32-sana-1.0 / 1.1; for the others, family.py there.

    What is given per stage starts at the full resolution, in the decoder too. A stage of no layers is left out: the
    convolution beyond it changes the resolution instead.
    """

    latent_channels: int = 32
    head_dim: int = 32
    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_block_types: tuple[str, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    decoder_block_types: tuple[str, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_norms: tuple[str, ...] = ("rms_norm",) * 6  # rms_norm | batch_norm; the encoder's are all rms_norm
    decoder_activations: tuple[str, ...] = ("silu",) * 6  # silu | relu, in ResBlocks; the encoder's are all silu
    downsample: str = "conv"  # conv (of stride 2) | pixel_unshuffle (after the convolution)
    upsample: str = "interpolate"  # interpolate (nearest, before the convolution) | pixel_shuffle (after it)
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    out_activation: str = "relu"  # silu | relu, before the last convolution
    scaling_factor: float = 0.41407
    attention_eps: float = 1e-15
    norm_eps: float = 1e-5

    @property
    def spatial_compression(self) -> int:
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class SchedulerConfig:
    """How noise becomes a latent (`sana_model.scheduler`)."""

    kind: str = "flow_dpm"  # flow_dpm | flow_euler | scm
    flow_shift: float = 3.0
    sigma_data: float = 0.5  # scm only


@dataclass(frozen=True)
class ModelConfig:
    """A whole pipeline, and the defaults a person gets without flags."""

    name: str
    dit: DiTConfig = field(default_factory=DiTConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    dialect: str = "diffusers"
    steps: int = 20
    guidance: float = 4.5
    max_text_tokens: int = 300
    instruction: str = "default"  # default (the complex human instruction) | none | a text of one's own
    pag_layers: tuple[int, ...] = (8,)

    @property
    def size(self) -> int:
        """Side of the native image in pixels."""
        return self.dit.sample_size * self.autoencoder.spatial_compression

    def with_dialect(self, dialect: str) -> "ModelConfig":
        """The same model as the other public implementation computes it; see docs/dialects.md."""
        if dialect not in DIALECTS:
            raise ValueError(f"dialect {dialect!r} is not known; choose one of {', '.join(DIALECTS)}")
        original = dialect == "original"
        dit = replace(
            self.dit,
            attention_eps=1e-8 if original else 1e-15,
            cross_qk_norm_eps=1e-6 if original else 1e-5,
        )
        return replace(self, dialect=dialect, dit=dit)


_DIT_06B = DiTConfig(hidden=1152, layers=28, cross_heads=16)
_DIT_16B = DiTConfig()
_DIT_15 = replace(_DIT_16B, qk_norm=True)
_SPRINT = {"qk_norm": True, "guidance_embeds": True}
_SCM = {"scheduler": SchedulerConfig(kind="scm"), "steps": 2}

_RANDOM_TINY = ModelConfig(
    name="sana-tiny-random",
    dit=DiTConfig(hidden=256, layers=8, cross_heads=4, caption_channels=256, sample_size=8),
    text=TextEncoderConfig(
        vocab=320, hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn=512, query_pre_attn_scalar=64.0,
        sliding_window=256,
    ),
    autoencoder=AutoencoderConfig(widths=(16, 32, 64, 64, 128, 128)),
    instruction="none",
    max_text_tokens=64,
    pag_layers=(4,),
)  # fmt: skip
_TINY = replace(  # as recipes/ trains it: 128 px, a vocabulary of its own
    _RANDOM_TINY,
    name="sana-tiny",
    dit=replace(_RANDOM_TINY.dit, sample_size=4),
    text=replace(_RANDOM_TINY.text, vocab=2048),
    guidance=3.0,
)

BUILT_IN: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        _TINY,
        _RANDOM_TINY,
        ModelConfig("sana-0.6b", _DIT_06B, pag_layers=(14,)),
        ModelConfig("sana-1.6b", _DIT_16B),
        ModelConfig("sana-1.5-1.6b", _DIT_15),
        ModelConfig("sana-1.5-4.8b", replace(_DIT_15, layers=60)),
        ModelConfig("sana-sprint-0.6b", replace(_DIT_06B, **_SPRINT), **_SCM),
        ModelConfig("sana-sprint-1.6b", replace(_DIT_16B, **_SPRINT), **_SCM),
    )
}
"""The names that need no file. `sana-tiny` is trained and comes with the package (`sana_model/checkpoints`); the others have
true shapes and seeded random weights (`sana_model.weights.random_weights`)."""
