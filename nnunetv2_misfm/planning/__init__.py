"""Writing configurations into nnU-Net plans."""
