"""The nnU-Net trainers of this package, one file per method."""
