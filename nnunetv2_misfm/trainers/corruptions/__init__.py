"""What Models Genesis does to a volume, one file per corruption: pure functions of a volume on its device."""
