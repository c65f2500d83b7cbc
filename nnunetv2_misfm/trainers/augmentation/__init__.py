"""nnU-Net's training augmentation for images without labels, on a batch and on the device that holds it."""
