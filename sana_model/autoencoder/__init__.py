"""DC-AE, between images and latents: dc_ae.py is the network, blocks.py what it is made of, bands.py how it stays small."""
