"""The pure functions of which Models Genesis is made: one file per corruption, and the range that they work in."""
