"""Whether pretraining beats stock nnU-Net: a grid of runs, metrics, statistics and a report."""
