"""`python -m sana_kernels`: what this machine can run, and why the rest is off."""

from sana_kernels.diagnostics import describe, render

print(render(describe()))
