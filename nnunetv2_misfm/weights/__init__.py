"""Reading, adapting and accounting for pretrained weights."""
