"""Self-supervised pretraining (Volume Fusion) and PCT-Net for nnU-Net v2, as an extension plugin."""

__version__ = "0.1.0"
