"""The exported folder: its files, its manifest, and how it is written in one step."""
