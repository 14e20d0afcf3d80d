"""Small models that several test files save, load and compare; random weights, the structure of the real ones."""

from dataclasses import replace

from sana_model.config import BUILT_IN, SchedulerConfig

TINY = BUILT_IN["sana-tiny-random"]
SMALL = replace(TINY, dit=replace(TINY.dit, layers=2), pag_layers=(1,))
SPRINT = replace(
    SMALL,
    dit=replace(SMALL.dit, qk_norm=True, guidance_embeds=True),
    scheduler=SchedulerConfig(kind="scm"),
    steps=2,
)
GEMMA_3 = replace(SMALL.text, attn_softcap=None, full_every=3, rope_theta=100.0, full_rope_theta=5e4, qk_norm=True)
