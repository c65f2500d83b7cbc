"""Making nnU-Net raw datasets."""
